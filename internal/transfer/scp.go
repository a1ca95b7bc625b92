package transfer

import (
	"bytes"
	"path"
	"strconv"
	"strings"
	"sync"
)

const (
	// maxLine bounds a line of the protocol, in bytes. OpenSSH's buffer has 2048
	// (scp.c, sink).
	maxLine = 2048 + maxPath
	// maxDepth bounds the nesting of directories.
	maxDepth = 256
)

// A Command is a command line that serves file transfers.
type Command struct {
	SFTP bool
	// SCP is true for scp as a server: the sink of an upload, or the source of a
	// download. Base is its arguments, joined by spaces; usually there is one.
	SCP, Upload bool
	Base        string
	// Plain is true if the line has no shell metacharacters that could run another
	// program.
	Plain bool
}

// ParseCommand recognises the command lines with which clients run sftp-server, or scp as
// a server. For other lines it returns the zero Command.
func ParseCommand(line string) Command {
	plain := !strings.ContainsAny(line, ";&|`$<>()\n")
	words := strings.Fields(line)
	for len(words) > 0 && (strings.Contains(words[0], "=") || words[0] == "exec" || words[0] == "sudo" || words[0] == "env") {
		words = words[1:]
	}
	for i, word := range words { // psftp sends "test -x FILE && exec FILE"
		if path.Base(word) == "sftp-server" && (i == 0 || words[i-1] == "exec" || words[i-1] == "sudo") {
			return Command{SFTP: true, Plain: plain}
		}
	}
	if len(words) == 0 {
		return Command{}
	}
	switch path.Base(strings.Trim(words[0], `'"`)) {
	case "sftp-server", "internal-sftp": // in quotes, or sshd's own server
		return Command{SFTP: true, Plain: plain}
	case "scp":
	default:
		return Command{}
	}
	c := Command{Plain: plain}
	i := 1
	for ; i < len(words) && strings.HasPrefix(words[i], "-"); i++ {
		if words[i] == "--" {
			i++
			break
		}
		c.SCP = c.SCP || strings.ContainsAny(words[i], "tf")
		c.Upload = c.Upload || strings.Contains(words[i], "t")
	}
	if !c.SCP {
		return Command{}
	}
	c.Base = clip([]byte(strings.Join(words[i:], " ")))
	return c
}

// An SCP parses a session of scp. Its methods may be called concurrently. The caller must
// pass data to it before it forwards the data.
//
// The source sends lines: T (times), C (a file), D (start of a directory), E (end of a
// directory). After each it waits for the answer of the sink. The bytes of the file and
// a status follow a C, and the sink answers again. An answer is a zero byte; or a byte 1
// (warning: the source continues with the next file) or 2 (fatal), and a line of text.
type SCP struct {
	upload bool
	base   string
	report func(Event) error

	mu     sync.Mutex
	err    error
	source state
	line   []byte   // from the source, so far
	dirs   []string // of the next file, outermost first
	inDir  bool     // the last line was a D
	file   Event    // of the last C
	size   int64    // of file
	left   int64    // bytes of file that the source has not sent
	begun  bool     // the sink has sent its first answer
	text   bool     // the sink is sending the text of its answer
	answer byte     // the first byte of the sink's answer
	reason []byte   // the text of the sink's answer
}

// A state is the next thing that the source does.
type state int

const (
	sendsLine    state = iota // T, C, D, E, or an error
	awaitsLine                // wait for the answer to the line
	sendsData                 // send the file
	sendsStatus               // send a zero byte, or an error
	awaitsStatus              // wait for the answer to the status
)

// NewSCP returns a parser for a session that runs the command. Its methods call report
// and return its errors.
func NewSCP(c Command, report func(Event) error) *SCP {
	return &SCP{upload: c.Upload, base: c.Base, report: report}
}

// FromClient parses data from the client. An error is returned once: it wraps ErrLost or
// is that of report.
func (s *SCP) FromClient(p []byte) error { return s.take(s.upload, p) }

// FromServer is FromClient for data from the server.
func (s *SCP) FromServer(p []byte) error { return s.take(!s.upload, p) }

func (s *SCP) take(fromSource bool, p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil
	}
	if fromSource {
		s.err = s.fromSource(p)
	} else {
		s.err = s.fromSink(p)
	}
	if s.err != nil {
		s.abandon()
	}
	return s.err
}

// End reports the file that is not finished. It must be the last call.
func (s *SCP) End() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.abandon()
}

func (s *SCP) abandon() error {
	pending := s.file.Path != ""
	e := s.file
	s.file = Event{}
	if !pending {
		return nil
	}
	// libssh2 closes the session after the file, without the last answer.
	if e.Failure == "" && (s.upload || s.source != awaitsStatus) {
		e.Failure = unfinished
	}
	return s.report(e)
}

func (s *SCP) fromSource(p []byte) error {
	for len(p) > 0 {
		switch s.source {
		case sendsData:
			n := min(int64(len(p)), s.left)
			p, s.left = p[n:], s.left-n
			s.file.Bytes += n
			if s.left == 0 {
				s.source = sendsStatus
			}
		case sendsLine, sendsStatus:
			if s.source == sendsStatus && len(s.line) == 0 && p[0] == 0 {
				p = p[1:]
				s.source = awaitsStatus
				continue
			}
			n := bytes.IndexByte(p, '\n') + 1
			if n == 0 {
				n = len(p)
			}
			s.line = append(s.line, p[:n]...)
			p = p[n:]
			if len(s.line) > maxLine {
				return lost("a line of more than %d bytes", maxLine)
			}
			if s.line[len(s.line)-1] != '\n' {
				return nil
			}
			line := string(bytes.TrimSuffix(s.line, []byte("\n")))
			s.line = s.line[:0]
			if err := s.sourceLine(line); err != nil {
				return err
			}
		default:
			return lost("the source did not wait for the answer of the sink")
		}
	}
	return nil
}

// sourceLine parses a line of the source.
func (s *SCP) sourceLine(line string) error {
	if line == "" {
		return lost("an empty line")
	}
	if s.source == sendsStatus {
		if line[0] != 1 && line[0] != 2 {
			return lost("a file does not end with a status")
		}
		s.file.Failure = clip([]byte(line[1:]))
		s.source = awaitsStatus
		return nil
	}
	switch line[0] {
	case 1: // a file cannot be read; the sink does not answer
		return s.report(Event{Kind: Transfer, Upload: s.upload, Base: s.base, Path: s.base, Failure: clip([]byte(line[1:]))})
	case 2:
		return nil
	case 'T':
	case 'E':
		if len(s.dirs) > 0 {
			s.dirs = s.dirs[:len(s.dirs)-1]
		}
	case 'C', 'D':
		mode, rest, ok := strings.Cut(line[1:], " ")
		digits, name, named := strings.Cut(rest, " ")
		size, err := strconv.ParseInt(digits, 10, 64)
		if !ok || !named || mode == "" || err != nil || size < 0 || name == "" {
			return lost("a malformed line of type %c", line[0])
		}
		if line[0] == 'C' {
			full := strings.Join(append(s.dirs[:len(s.dirs):len(s.dirs)], name), "/")
			s.file, s.size = Event{Kind: Transfer, Upload: s.upload, Base: s.base, Path: clip([]byte(full))}, size
			break
		}
		if len(s.dirs) >= maxDepth {
			return lost("directories are nested more than %d deep", maxDepth)
		}
		s.dirs, s.inDir = append(s.dirs, clip([]byte(name))), true
	default:
		return lost("a line that begins with %q", line[:1])
	}
	s.source = awaitsLine
	return nil
}

// fromSink parses the answers of the sink.
func (s *SCP) fromSink(p []byte) error {
	for _, c := range p {
		if s.text {
			if c != '\n' {
				if len(s.reason) < maxLine {
					s.reason = append(s.reason, c)
				}
				continue
			}
			s.text = false
			if err := s.answered(clip(s.reason)); err != nil {
				return err
			}
			continue
		}
		switch s.answer = c; c {
		case 0:
			if err := s.answered(""); err != nil {
				return err
			}
		case 1, 2:
			s.text, s.reason = true, s.reason[:0]
		default:
			return lost("an answer of the sink that begins with %q", string(rune(c)))
		}
	}
	return nil
}

// answered handles an answer of the sink. failure is empty if the sink accepts the line or
// the file.
func (s *SCP) answered(failure string) error {
	file := s.file
	switch {
	case s.source == awaitsLine && file.Path != "" && failure == "":
		if s.source, s.left = sendsData, s.size; s.size == 0 {
			s.source = sendsStatus
		}
		file.Kind = Opened
		return s.report(file)
	case s.source == awaitsLine:
		s.source = sendsLine
		if s.inDir && failure != "" { // the source skips the directory and sends no E
			s.dirs = s.dirs[:len(s.dirs)-1]
		}
		s.inDir = false
	case s.source == awaitsStatus:
		s.source = sendsLine
	case !s.begun && s.answer != 2:
		s.begun = true
		return nil
	case failure != "": // in the middle of a file
		if s.file.Path == "" {
			return nil
		}
	default:
		return lost("an answer of the sink to nothing")
	}
	if file.Path == "" {
		return nil
	}
	s.file = Event{}
	if failure != "" {
		file.Failure = failure
	}
	return s.report(file)
}
