// Command sshdshim poses as sshd(8) for OpenSSH's own regress suite, and serves
// with the gateway and bastion-agent in its place. It is a test tool.
//
// The suite starts its server in two ways, and the shim follows both:
//
//	sshd -i -f CONFIG              one connection, on standard input and output
//	sshd -f CONFIG -E LOG [-D]     a daemon that writes PidFile when it listens
//
// In the first case it serves one connection in this process, in the second it runs
// the gateway program. Both have the same parts, by package daemon, and share one state
// folder, so all connections of a run share one bastion. Calls with -t and -V are
// passed to the real sshd. For -T the shim prints the settings that the suite reads, as
// the gateway has them.
//
// The options of the suite's sshd_config are translated into a gateway's configuration
// and into options of authorized_keys; see translators. An option without a
// translation is an error: no test may pass because its option was ignored.
//
// The working folder is built in, because the suite starts the shim with different
// environments and paths:
//
//	go build -ldflags "-X main.home=DIR"
//
// DIR/bin must hold gateway and bastion-agent; DIR/state is made.
package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// home is set by the linker.
var home string

const realSSHD = "/usr/sbin/sshd"

func main() {
	if home == "" {
		fail(fmt.Errorf("built without a home, see its documentation"))
	}
	args := os.Args[1:]
	if len(args) == 2 && args[0] == "-Q" {
		if err := printOffers(os.Stdout, args[1]); err != nil {
			fail(err)
		}
		return
	}
	call, err := parseCall(args)
	if err != nil {
		fail(err)
	}
	if call.askSSHD {
		err := syscall.Exec(realSSHD, append([]string{realSSHD}, args...), os.Environ())
		fail(fmt.Errorf("%s: %w", realSSHD, err))
	}
	if call.printSettings {
		if err := printSettings(os.Stdout, call); err != nil {
			fail(err)
		}
		return
	}
	log := io.Writer(os.Stderr)
	if call.log != "" {
		file, err := os.OpenFile(call.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			fail(err)
		}
		log = file
	}
	switch {
	case call.inetd:
		err = serveStdio(call, log)
	case call.foreground:
		err = supervise(call, log)
	default:
		err = daemonise(args, call)
	}
	if err != nil {
		fmt.Fprintln(log, "sshdshim:", err)
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "sshdshim:", err)
	os.Exit(255) // as sshd does
}

// A call is sshd's command line.
type call struct {
	askSSHD       bool
	printSettings bool
	inetd         bool
	foreground    bool
	config        string
	log           string
	options       []string // of -o; they go before the file's
}

func parseCall(args []string) (call, error) {
	var c call
	for i := 0; i < len(args); i++ {
		flag, value := args[i], ""
		if len(flag) < 2 || flag[0] != '-' {
			return c, fmt.Errorf("argument %q is not understood", flag)
		}
		flag, value = flag[:2], flag[2:]
		if strings.Contains("-f-E-o-h-p-C", flag) && value == "" {
			if i++; i == len(args) {
				return c, fmt.Errorf("%s needs a value", flag)
			}
			value = args[i]
		}
		switch flag {
		case "-t", "-V", "-G":
			c.askSSHD = true
		case "-T":
			c.printSettings = true
		case "-C":
		case "-i":
			c.inetd = true
		case "-D":
			c.foreground = true
		case "-f":
			c.config = value
		case "-E":
			c.log = value
		case "-o":
			c.options = append(c.options, value)
		default:
			return c, fmt.Errorf("option %s is not understood", flag)
		}
	}
	if c.config == "" && !c.askSSHD {
		return c, fmt.Errorf("-f is missing")
	}
	return c, nil
}

// printOffers prints the algorithms of a kind, by its name for ssh -Q, that both the
// installed ssh and the gateway have.
func printOffers(w io.Writer, kind string) error {
	out, err := exec.Command("ssh", "-Q", kind).Output()
	if err != nil {
		return fmt.Errorf("ssh -Q %s: %w", kind, err)
	}
	for name := range strings.Lines(string(out)) {
		if offered(kind, strings.TrimSpace(name)) {
			fmt.Fprint(w, name)
		}
	}
	return nil
}

// printSettings prints the gateway's settings as sshd -T does: rekeylimit, which
// is all that the suite asks for in the scripts that are run.
func printSettings(w io.Writer, c call) error {
	dir, err := os.MkdirTemp(home, "settings-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	cfg, err := load(c, dir)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "rekeylimit %d %d\n", cfg.RekeyBytes, int(cfg.RekeyInterval.Seconds()))
	return nil
}
