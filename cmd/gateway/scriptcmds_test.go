package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// account adds an account. See [sshtest.NewAccount].
func (env *scriptEnv) account(ts *testscript.TestScript, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: account NAME")
	}
	// The script's own folder is closed to other accounts.
	home, err := os.MkdirTemp("/tmp", "sallyport-home-")
	ts.Check(err)
	ts.Defer(func() { os.RemoveAll(home) })
	a, err := sshtest.AddAccount(home)
	ts.Check(err)
	ts.Setenv(args[0], a.Name)
	ts.Setenv(args[0]+"_HOME", a.Home)
}

// listen serves echo or a banner, as nobody's bastion does.
func (env *scriptEnv) listen(ts *testscript.TestScript, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: listen ADDR echo|banner")
	}
	network, addr := "tcp", args[0]
	if strings.Contains(addr, "/") {
		network = "unix"
	}
	l, err := net.Listen(network, addr)
	ts.Check(err)
	env.listeners = append(env.listeners, l)
	env.serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			env.serving.Go(func() {
				defer c.Close()
				if args[1] == "banner" {
					io.WriteString(c, "220 ready\n")
				}
				io.Copy(c, c)
			})
		}
	})
}

// status runs a command that must exit with a certain status.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || neg {
		ts.Fatalf("usage: status N CMD ...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit := (*exec.ExitError)(nil)
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: eventually CMD ...")
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := ts.Exec(args[0], args[1:]...)
		if (err == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("still %v after a minute", err)
		}
	}
}

// logged waits for a record of a log: programs write some of them after their peers have
// gone. Without -count it waits for any number of lines that match.
func logged(ts *testscript.TestScript, neg bool, args []string) {
	want := 0
	if len(args) > 0 && strings.HasPrefix(args[0], "-count=") {
		n, err := strconv.Atoi(strings.TrimPrefix(args[0], "-count="))
		ts.Check(err)
		want, args = n, args[1:]
	}
	if len(args) != 2 || neg {
		ts.Fatalf("usage: logged [-count=N] REGEXP FILE")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		text, err := os.ReadFile(ts.MkAbs(args[1]))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			ts.Fatalf("%v", err)
		}
		got := len(re.FindAllIndex(text, -1))
		if got > 0 && (want == 0 || got == want) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s has %d lines that match %s after a minute:\n%s", args[1], got, args[0], text)
		}
	}
}

func appendLine(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: append FILE TEXT")
	}
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	ts.Check(err)
	_, err = fmt.Fprintln(f, args[1])
	ts.Check(errors.Join(err, f.Close()))
}
