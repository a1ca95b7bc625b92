package console

import (
	"bufio"
	"errors"
	"io"
	"strings"
	"sync"

	gliderssh "github.com/gliderlabs/ssh"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"golang.org/x/term"
)

// A session runs one command, or a prompt for commands.
type session struct {
	console  *Console
	conn     *connection
	identity identity.Identity
	running  sync.WaitGroup // goroutines that use the session

	kind     string // request that began it: shell or exec
	pty      bool
	size     gliderssh.Window
	resizes  <-chan gliderssh.Window
	terminal *term.Terminal // with a pty
	lines    *bufio.Reader  // without
	history  *lineHistory   // with a pty

	out, err io.Writer
}

const banner = "This is your console at the gateway, not your bastion. Type help for the commands, and exit to leave.\n"

// begin is called with the request that begins the session, before run.
func (s *session) begin(sess gliderssh.Session, kind string) bool {
	s.kind = kind
	// Here and not in run, because the handler later writes the fields that
	// Pty reads.
	var pty gliderssh.Pty
	pty, s.resizes, s.pty = sess.Pty()
	s.size = pty.Window
	s.running.Add(1)
	return true
}

// run serves the session and sends the exit status.
func (s *session) run(sess gliderssh.Session) {
	defer s.running.Done()
	defer s.conn.closeOnPanic("command")
	in := &activeReader{s.conn, sess}
	if s.pty {
		s.history = &lineHistory{}
		s.terminal = term.NewTerminal(struct {
			io.Reader
			io.Writer
		}{&interruptReader{Reader: in}, sess}, "")
		s.terminal.History = s.history
		s.out, s.err = s.terminal, s.terminal
		s.resize(s.size)
		s.conn.mu.Lock()
		s.conn.terminals[s] = struct{}{}
		s.conn.mu.Unlock()
		defer func() {
			s.conn.mu.Lock()
			delete(s.conn.terminals, s)
			s.conn.mu.Unlock()
		}()
		// The handler blocks until each size is received, even after run has
		// returned.
		s.running.Go(func() {
			defer s.conn.closeOnPanic("resize")
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
		status = s.runLine(sess.RawCommand())
	} else {
		status = s.prompt()
	}
	sess.Exit(status)
}

// resize sets the terminal's size, within limits, because clients may send any.
func (s *session) resize(size gliderssh.Window) {
	s.terminal.SetSize(min(max(size.Width, 1), 1000), min(max(size.Height, 1), 1000))
}

// prompt reads and runs command lines until the end of the input, and returns the status
// of the last.
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
				s.history.add(line)
			}
			status = s.runLine(line)
		}
	}
}

// maxLine is the limit of a line, in bytes.
const maxLine = 4096

var errLong = usageError("the line is too long")

// readLine reads a line. Prompt is shown only on a terminal.
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

// confirm asks the user to confirm an action. It returns an error if the user declines,
// or if there is no terminal.
func (s *session) confirm(question string) error {
	if !s.pty {
		return usageError("this needs a confirmation and there is no terminal; add --yes")
	}
	answer, err := s.readLine(question + " [y/N] ")
	if err != nil {
		return userError("Nothing was done.")
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return userError("Nothing was done.")
}

// An activeReader resets the connection's idle timeout when it reads input.
type activeReader struct {
	conn *connection
	from io.Reader
}

func (r *activeReader) Read(p []byte) (int, error) {
	n, err := r.from.Read(p)
	if n > 0 {
		r.conn.resetIdle()
	}
	return n, err
}

// An interruptReader makes Ctrl-C discard the line, as in a shell. Package term would
// take it for the end of the input.
type interruptReader struct {
	io.Reader
	rest []byte
}

func (i *interruptReader) Read(p []byte) (int, error) {
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

// A lineHistory holds the command lines of a prompt, without answers to confirm.
type lineHistory struct{ lines []string }

const maxHistory = 100

// Add implements [term.History]. It does nothing, because package term also calls it for
// answers; prompt calls add.
func (*lineHistory) Add(string) {}

func (h *lineHistory) add(line string) {
	if n := len(h.lines); n > 0 && h.lines[n-1] == line {
		return
	}
	if len(h.lines) == maxHistory {
		h.lines = h.lines[1:]
	}
	h.lines = append(h.lines, line)
}

// Len implements [term.History].
func (h *lineHistory) Len() int { return len(h.lines) }

// At implements [term.History]: 0 is the last line.
func (h *lineHistory) At(i int) string { return h.lines[len(h.lines)-1-i] }
