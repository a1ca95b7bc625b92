package agent

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// stopOutput answers eow@openssh.com (OpenSSH PROTOCOL section 2.1): the client has stopped
// reading standard output, as in "ssh host yes | head". It closes the pipe, so that the
// process gets SIGPIPE; otherwise the process would write forever.
//
// The copying may be blocked, because the client does not open its window any more. The
// session does not wait for it.
func (s *session) stopOutput() bool {
	if s.stdout == nil {
		return false
	}
	select {
	case <-s.eow:
		return true
	default:
		close(s.eow)
	}
	if s.tty == nil {
		s.stdout.from.Close()
	}
	s.stdout.end()
	return true
}

// openFiles returns the standard files for the process, and starts copying between them and
// the channel.
func (s *session) openFiles() (child [3]*os.File, err error) {
	if s.tty != nil {
		s.undelivered = 1
		s.stdout = s.copyOut(s.ch, s.tty.master)
		s.copyIn(s.tty.master)
		return [3]*os.File{s.tty.slave, s.tty.slave, s.tty.slave}, nil
	}
	// Pipes and not sockets: a process can open /dev/stdin, and each direction has an
	// end of its own.
	var ours [3]*os.File
	for i := range ours {
		fds, err := s.c.login.Account.pipe()
		if err != nil {
			closeAll(ours[:])
			closeAll(child[:])
			return child, err
		}
		mine, its := fds[0], fds[1]
		if i == 0 {
			mine, its = its, mine
		}
		unix.SetNonblock(mine, true) // for the runtime's poller; the process's end blocks
		ours[i], child[i] = os.NewFile(uintptr(mine), "pipe"), os.NewFile(uintptr(its), "pipe")
	}
	s.copyIn(ours[0])
	s.undelivered = 2
	s.stdout = s.copyOut(s.ch, ours[1])
	s.stderr = s.copyOut(s.ch.Stderr(), ours[2])
	return child, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// track adds f to the session's files, which finish closes.
func (s *session) track(f *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ourFiles = append(s.ourFiles, f)
	if s.detached {
		s.stopCopying(f)
	}
}

// An outStream copies an output of the process to the client.
type outStream struct {
	s     *session
	from  *os.File
	to    io.Writer
	began atomic.Int64 // start of the current Write, in Unix nanoseconds; 0 if there is none
	once  sync.Once
}

// Write implements [io.Writer].
func (o *outStream) Write(p []byte) (int, error) {
	o.began.Store(time.Now().UnixNano())
	defer o.began.Store(0)
	return o.to.Write(p)
}

// stuck reports whether the current Write has taken longer than timeout, because the client
// does not open its window.
func (o *outStream) stuck(timeout time.Duration) bool {
	began := o.began.Load()
	return began != 0 && time.Since(time.Unix(0, began)) > timeout
}

// end marks o as delivered.
func (o *outStream) end() {
	o.once.Do(func() {
		o.s.mu.Lock()
		defer o.s.mu.Unlock()
		if o.s.undelivered--; o.s.undelivered == 0 {
			close(o.s.delivered)
		}
	})
}

// copyOut copies output to the client until all writers have closed it, or, for a terminal,
// until finish sets a deadline. (A terminal without processes returns EIO.) If writing to
// the client fails, it closes the pipe, and processes that write get SIGPIPE.
func (s *session) copyOut(to io.Writer, from *os.File) *outStream {
	s.track(from)
	o := &outStream{s: s, from: from, to: to}
	s.c.spawn("session output", func() {
		defer o.end()
		err := copyFrom(o, from)
		if s.tty == nil {
			from.Close()
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			copyRest(o, from)
		}
	})
	return o
}

// copyIn copies the client's input, and its EOF, to the process.
func (s *session) copyIn(to *os.File) {
	s.track(to)
	var w io.Writer = to
	if s.tty != nil {
		w = terminalInput{to}
	}
	s.c.spawn("session input", func() {
		if _, err := s.ch.WriteTo(w); err != nil {
			// The process has closed its input. As sshd does, send eow@openssh.com,
			// and discard the rest so that the client's window does not fill.
			s.ch.SendRequest("eow@openssh.com", false, nil)
			if s.tty == nil {
				to.Close()
			}
			io.Copy(io.Discard, s.ch)
			return
		}
		if s.tty == nil {
			to.Close()
		}
	})
}

// finish waits for the process and its output, and closes the channel. As in sshd, the order
// is: exit-status, the rest of the output, EOF, close. EOF does not precede exit-status even
// if the process has closed its output long before its end, because a client may close the
// channel at EOF and would not get the status.
//
// If the client closes the channel before the process has ended, finish returns and the
// process continues. If proc is nil, finish reports status.
func (s *session) finish(proc *process, status unix.WaitStatus) {
	defer close(s.done)
	if proc != nil {
		select {
		case <-proc.ended:
			status = proc.status
		case <-s.clientClosed:
			return // the copying goroutines close the files
		}
	}
	if status.Signaled() {
		s.ch.SendRequest("exit-signal", false, sshmsg.ExitSignal{
			Name: signalName(status.Signal()), CoreDumped: status.CoreDump(),
		}.Append(nil))
	} else {
		s.ch.SendRequest("exit-status", false, sshmsg.AppendExitStatus(nil, uint32(status.ExitStatus())))
	}
	if s.tty != nil {
		// Send the output that is in the terminal now. As in sshd, background jobs
		// that keep the terminal open do not keep the session open.
		s.tty.master.SetReadDeadline(time.Now())
	}
	if s.awaitOutput() {
		s.ch.CloseWrite()
	}
	s.ch.Close()

	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.ourFiles)
}

// stderrTimeout is how long a write of standard error may block after the client has stopped
// reading standard output. The session then ends without the rest.
const stderrTimeout = time.Second

// awaitOutput waits until all output has been sent. It returns false if the client has sent
// eow@openssh.com: a write may be blocked then, so EOF cannot be sent.
func (s *session) awaitOutput() bool {
	select {
	case <-s.delivered:
	case <-s.eow:
		tick := time.NewTicker(stderrTimeout / 2)
		defer tick.Stop()
		for s.stderr == nil || !s.stderr.stuck(stderrTimeout) {
			select {
			case <-s.delivered:
				return false
			case <-tick.C:
			}
		}
	}
	select {
	case <-s.eow:
		return false
	default:
		return true
	}
}

func exitCode(code int) unix.WaitStatus { return unix.WaitStatus(code << 8) }

// detach closes the standard files of the process after the client has closed the channel.
// If there is a terminal, the kernel sends SIGHUP to its session. Without a terminal the
// process gets no signal, as with sshd, so that processes that were started to outlive the
// connection do.
func (s *session) detach() {
	close(s.clientClosed)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.detached = true
	for _, f := range s.ourFiles {
		s.stopCopying(f) // the copying goroutine closes f
	}
	if s.tty != nil {
		s.tty.master.Close() // the kernel hangs up the terminal
	}
}

// stopCopying ends the copying of output at once, and that of input when the process has
// read the data that the client sent before it closed the channel, or after drainTimeout.
func (s *session) stopCopying(f *os.File) {
	f.SetReadDeadline(time.Now())
	f.SetWriteDeadline(time.Now().Add(drainTimeout))
}
