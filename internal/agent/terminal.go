package agent

import (
	"fmt"
	"os"
	"os/user"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// A terminal is a session's pseudo terminal.
type terminal struct {
	master *os.File
	// slave must be closed once the process has started: while it is open, reading
	// from master does not end.
	slave *os.File
	term  string // the variable TERM
}

// openTerminal opens a terminal that belongs to the account.
func (a Account) openTerminal(r sshmsg.PTY) (*terminal, error) {
	modes, err := parseModes(r.Modes)
	if err != nil {
		return nil, fmt.Errorf("terminal modes: %w", err)
	}
	t := &terminal{term: r.Term}
	if t.master, t.slave, err = openPair(); err != nil {
		return nil, fmt.Errorf("opening a terminal: %w", err)
	}
	if err := t.setUp(a, r, modes); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// openPair opens the two ends of a new pseudo terminal. The master is non-blocking, so that
// package os polls it; the slave blocks, as programs expect. (github.com/creack/pty leaves
// the master blocking, which takes a thread for each terminal and has no deadlines.)
func openPair() (master, slave *os.File, err error) {
	const flags = unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	m, err := unix.Open("/dev/ptmx", flags|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(m), "/dev/ptmx")
	number, err := unix.IoctlGetInt(m, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0) // unlock the slave
	}
	name := "/dev/pts/" + strconv.Itoa(number)
	var s int
	if err == nil {
		s, err = unix.Open(name, flags, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	return master, os.NewFile(uintptr(s), name), nil
}

func (t *terminal) setUp(a Account, r sshmsg.PTY, modes []terminalMode) error {
	if os.Geteuid() == 0 {
		// As in sshd and login(1), because write(1) and wall(1) run as group tty.
		gid, mode := int(a.GID), os.FileMode(0o622)
		if g, err := user.LookupGroup("tty"); err == nil {
			if n, err := strconv.Atoi(g.Gid); err == nil {
				gid, mode = n, 0o620
			}
		}
		if err := t.slave.Chown(int(a.UID), gid); err != nil {
			return err
		}
		if err := t.slave.Chmod(mode); err != nil {
			return err
		}
	}
	if err := setModes(int(t.slave.Fd()), modes); err != nil {
		return fmt.Errorf("setting terminal modes: %w", err)
	}
	return t.resize(sshmsg.WindowChange{Columns: r.Columns, Rows: r.Rows, Width: r.Width, Height: r.Height})
}

func (t *terminal) name() string { return t.slave.Name() }

// resize sets the window size. The kernel sends SIGWINCH to the foreground process group.
func (t *terminal) resize(r sshmsg.WindowChange) error {
	size := unix.Winsize{Col: uint16(r.Columns), Row: uint16(r.Rows), Xpixel: uint16(r.Width), Ypixel: uint16(r.Height)}
	return t.control(func(fd int) error { return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &size) })
}

// sendBreak is tcsendbreak(3) with duration 0.
func (t *terminal) sendBreak() error {
	return t.control(func(fd int) error { return unix.IoctlSetInt(fd, unix.TCSBRK, 0) })
}

// hangUp sends SIGHUP to the foreground process group.
func (t *terminal) hangUp() {
	t.control(func(fd int) error {
		pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		if err != nil || pgrp <= 1 {
			return err
		}
		return unix.Kill(-pgrp, unix.SIGHUP)
	})
}

func (t *terminal) control(f func(fd int) error) error {
	raw, err := t.master.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// notify writes a line to the terminal, as wall(1) does. It does nothing if the output of the
// terminal is stopped.
func (t *terminal) notify(line string) {
	fd, err := unix.Open(t.name(), unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	unix.Write(fd, []byte("\n"+line+"\n"))
}

// A terminalInput writes a client's input to its terminal. Package mux calls TryWrite.
type terminalInput struct{ *os.File }

// TryWrite writes as much of p as the terminal takes without waiting.
func (t terminalInput) TryWrite(p []byte) (n int) {
	raw, err := t.SyscallConn()
	if err != nil {
		return 0
	}
	raw.Write(func(fd uintptr) bool {
		n, err = unix.Write(int(fd), p)
		return true
	})
	return max(n, 0)
}

// close closes both ends. The kernel sends SIGHUP to the terminal's session.
func (t *terminal) close() {
	t.slave.Close()
	t.master.Close()
}

// setModes sets the client's terminal modes. Other modes do not change.
func setModes(fd int, modes []terminalMode) error {
	tio, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	for _, m := range modes {
		applyMode(tio, m)
	}
	return unix.IoctlSetTermios(fd, unix.TCSETS, tio)
}

func applyMode(tio *unix.Termios, m terminalMode) {
	if i, ok := modeChars[m.Opcode]; ok {
		tio.Cc[i] = byte(m.Value)
		if m.Value == 255 { // no such character, which is 0 in Linux
			tio.Cc[i] = 0
		}
	} else if f, ok := modeFlags[m.Opcode]; ok {
		flags := [...]*uint32{&tio.Iflag, &tio.Lflag, &tio.Oflag, &tio.Cflag}[f.set]
		if m.Value != 0 {
			*flags |= f.bit
		} else {
			*flags &^= f.bit
		}
	} else if speed, ok := speeds[m.Value]; ok && m.Opcode == opOSpeed {
		tio.Cflag = tio.Cflag&^unix.CBAUD | speed
		tio.Ospeed = speed
	} else if ok && m.Opcode == opISpeed {
		tio.Ispeed = speed
	}
}

// The opcodes of RFC 4254 section 8, and of RFC 8160 (IUTF8), that Linux supports.
const (
	opISpeed = 128
	opOSpeed = 129
)

var modeChars = map[byte]int{
	1: unix.VINTR, 2: unix.VQUIT, 3: unix.VERASE, 4: unix.VKILL, 5: unix.VEOF, 6: unix.VEOL,
	7: unix.VEOL2, 8: unix.VSTART, 9: unix.VSTOP, 10: unix.VSUSP, 12: unix.VREPRINT,
	13: unix.VWERASE, 14: unix.VLNEXT, 16: unix.VSWTC, 18: unix.VDISCARD,
}

// The four fields of flags in a termios.
const (
	iflag = iota
	lflag
	oflag
	cflag
)

var modeFlags = map[byte]struct {
	set int
	bit uint32
}{
	30: {iflag, unix.IGNPAR}, 31: {iflag, unix.PARMRK}, 32: {iflag, unix.INPCK}, 33: {iflag, unix.ISTRIP},
	34: {iflag, unix.INLCR}, 35: {iflag, unix.IGNCR}, 36: {iflag, unix.ICRNL}, 37: {iflag, unix.IUCLC},
	38: {iflag, unix.IXON}, 39: {iflag, unix.IXANY}, 40: {iflag, unix.IXOFF}, 41: {iflag, unix.IMAXBEL},
	42: {iflag, unix.IUTF8},
	50: {lflag, unix.ISIG}, 51: {lflag, unix.ICANON}, 52: {lflag, unix.XCASE}, 53: {lflag, unix.ECHO},
	54: {lflag, unix.ECHOE}, 55: {lflag, unix.ECHOK}, 56: {lflag, unix.ECHONL}, 57: {lflag, unix.NOFLSH},
	58: {lflag, unix.TOSTOP}, 59: {lflag, unix.IEXTEN}, 60: {lflag, unix.ECHOCTL}, 61: {lflag, unix.ECHOKE},
	62: {lflag, unix.PENDIN},
	70: {oflag, unix.OPOST}, 71: {oflag, unix.OLCUC}, 72: {oflag, unix.ONLCR}, 73: {oflag, unix.OCRNL},
	74: {oflag, unix.ONOCR}, 75: {oflag, unix.ONLRET},
	90: {cflag, unix.CS7}, 91: {cflag, unix.CS8}, 92: {cflag, unix.PARENB}, 93: {cflag, unix.PARODD},
}

var speeds = map[uint32]uint32{
	0: unix.B0, 50: unix.B50, 75: unix.B75, 110: unix.B110, 134: unix.B134, 150: unix.B150,
	200: unix.B200, 300: unix.B300, 600: unix.B600, 1200: unix.B1200, 1800: unix.B1800,
	2400: unix.B2400, 4800: unix.B4800, 9600: unix.B9600, 19200: unix.B19200, 38400: unix.B38400,
	57600: unix.B57600, 115200: unix.B115200, 230400: unix.B230400,
}
