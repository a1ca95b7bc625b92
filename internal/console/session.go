package console

import (
	"bufio"
	"errors"
	"io"
	"strings"
	"sync"

	gliderssh "github.com/gliderlabs/ssh"
	"golang.org/x/term"
)

// A session is one command, or one prompt.
type session struct {
	*visit
	running sync.WaitGroup // run

	kind     string // of the request that began it
	pty      bool
	size     gliderssh.Window
	resizes  <-chan gliderssh.Window
	terminal *term.Terminal // if there is a pty
	lines    *bufio.Reader  // else
	history  *history

	out, err io.Writer
}

const banner = "This is your console at the gateway; your bastion is not involved. Type help for what it can do, and exit to leave.\n"

// begin notes what the request is that begins the session.
func (s *session) begin(sess gliderssh.Session, kind string) bool {
	s.kind = kind
	// Later on the handler writes to what Pty reads.
	var pty gliderssh.Pty
	pty, s.resizes, s.pty = sess.Pty()
	s.size = pty.Window
	s.running.Add(1)
	return true
}

// run is the session, from its request to its exit status.
func (s *session) run(sess gliderssh.Session) {
	defer s.running.Done()
	defer s.recover("command")
	in := &typed{s.visit, sess}
	if s.pty {
		s.history = &history{}
		s.terminal = term.NewTerminal(struct {
			io.Reader
			io.Writer
		}{&interrupts{Reader: in}, sess}, "")
		s.terminal.History = s.history
		s.out, s.err = s.terminal, s.terminal
		s.resize(s.size)
		s.mu.Lock()
		s.terminals[s] = struct{}{}
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			delete(s.terminals, s)
			s.mu.Unlock()
		}()
		// Whoever sends sizes waits until they are taken, also when this
		// has ended.
		s.running.Go(func() {
			defer s.recover("resize")
			for size := range s.resizes {
				s.resize(size)
			}
		})
	} else {
		s.lines = bufio.NewReaderSize(in, maxLine)
		s.out, s.err = sess, sess.Stderr()
	}

	status := 0
	if s.kind == "exec" {
		status = s.do(sess.RawCommand())
	} else {
		status = s.prompt()
	}
	sess.Exit(status)
}

// resize tells the terminal its size; clients may send any.
func (s *session) resize(size gliderssh.Window) {
	s.terminal.SetSize(min(max(size.Width, 1), 1000), min(max(size.Height, 1), 1000))
}

// prompt carries out line by line until there are no more, and returns the
// status of the last.
func (s *session) prompt() (status int) {
	if s.pty {
		io.WriteString(s.out, banner)
	}
	for {
		line, err := s.readLine("ctl> ")
		if errors.Is(err, errLong) {
			return s.fail(err)
		}
		switch line = strings.TrimSpace(line); {
		case err != nil && line == "":
			if s.pty {
				io.WriteString(s.out, "\n")
			}
			return status
		case line == "":
		case line == "exit", line == "quit":
			return status
		default:
			if s.history != nil {
				s.history.keep(line)
			}
			status = s.do(line)
		}
	}
}

// maxLine is the longest line, in bytes.
const maxLine = 4096

var errLong = usage("a line is too long")

// readLine reads a line without its end. Prompt is shown on a terminal only.
func (s *session) readLine(prompt string) (string, error) {
	if !s.pty {
		line, err := s.lines.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			return "", errLong
		}
		return string(line), err
	}
	s.terminal.SetPrompt(prompt)
	defer s.terminal.SetPrompt("")
	line, err := s.terminal.ReadLine()
	if errors.Is(err, term.ErrPasteIndicator) {
		err = nil
	}
	return line, err
}

// confirm asks whether to go on, where there is somebody who can answer.
func (s *session) confirm(question string) error {
	if !s.pty {
		return usage("nobody can be asked here; add --yes if you mean it")
	}
	answer, err := s.readLine(question + " [y/N] ")
	if err != nil {
		return sentence("Nothing was done.")
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return sentence("Nothing was done.")
}

// typed is what comes from the user; reading it keeps the connection from
// being idle.
type typed struct {
	*visit
	from io.Reader
}

func (t *typed) Read(p []byte) (int, error) {
	n, err := t.from.Read(p)
	if n > 0 {
		t.touch()
	}
	return n, err
}

// interrupts makes Ctrl-C drop the line, as a shell does. Package term would take
// it for the end of the input.
type interrupts struct {
	io.Reader
	rest []byte
}

func (i *interrupts) Read(p []byte) (int, error) {
	if len(i.rest) == 0 {
		buf := make([]byte, 256)
		n, err := i.Reader.Read(buf)
		if n == 0 {
			return 0, err
		}
		const ctrlC, ctrlE, ctrlU = "\x03", "\x05", "\x15"
		i.rest = []byte(strings.ReplaceAll(string(buf[:n]), ctrlC, ctrlE+ctrlU+"\r"))
	}
	n := copy(p, i.rest)
	i.rest = i.rest[n:]
	return n, nil
}

// A history is what was typed at the prompt, but not answers to questions.
type history struct{ lines []string }

const maxHistory = 100

// Add implements [term.History]; see keep.
func (*history) Add(string) {}

func (h *history) keep(line string) {
	if n := len(h.lines); n > 0 && h.lines[n-1] == line {
		return
	}
	if len(h.lines) == maxHistory {
		h.lines = h.lines[1:]
	}
	h.lines = append(h.lines, line)
}

// Len implements [term.History].
func (h *history) Len() int { return len(h.lines) }

// At implements [term.History]: 0 is the last line.
func (h *history) At(i int) string { return h.lines[len(h.lines)-1-i] }
