// Command sshdshim poses as sshd(8) for OpenSSH's own regress suite, and serves
// with the gateway and bastion-agent in its place. It is a test tool.
//
// The suite starts its server in two ways, and the shim follows both:
//
//	sshd -i -f CONFIG              one connection, on standard input and output
//	sshd -f CONFIG -E LOG [-D]     a daemon that writes PidFile when it listens
//
// For the first it is a gateway of one connection, in this process; for the
// second it runs the real gateway program. Both share one state folder, so all
// connections of a run share one bastion, started by whoever comes first. What
// the suite asks of sshd about itself (-t, -T, -V) the real sshd answers.
//
// The options of the generated sshd_config are translated into a gateway's
// configuration and into options of authorized_keys; see translate. One that
// cannot be is an error: no test may pass because it was not heard.
//
// The folder it works in is built in, since neither the environment nor the
// path of the program is the same wherever the suite starts it:
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
	askSSHD    bool
	inetd      bool
	foreground bool
	config     string
	log        string
	options    []string // of -o; they go before the file's
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
		case "-t", "-T", "-V", "-G":
			c.askSSHD = true
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

// printOffers prints which algorithms of a kind, by its name for ssh -Q, both
// the installed ssh and the gateway have.
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
