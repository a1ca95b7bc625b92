package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
)

// ptyMain plays a person at a terminal: it runs a command on one, executes the lines of a
// file, prints the output of the command, and exits with its status.
//
//	pty [-size ROWSxCOLS] FILE COMMAND ...
//
// The lines of the file are
//
//	expect REGEXP   waits until the output since the last match has one
//	type TEXT       types it and presses return; ^C and the like are control keys,
//	                and without return if there is nothing else
//	press TEXT      types it without return
//	size ROWS COLS  changes the size of the window
//	hangup          sends SIGHUP to the command, as closing the terminal does
func ptyMain() {
	size := flag.String("size", "24x80", "")
	flag.Parse()
	status, err := (&person{more: sync.NewCond(&sync.Mutex{})}).run(*size, flag.Arg(0), flag.Args()[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "pty:", err)
		os.Exit(125)
	}
	os.Exit(status)
}

type person struct {
	command  *exec.Cmd
	terminal *os.File

	more   *sync.Cond // guards the fields below, and signals more output
	output []byte     // not yet matched
	ended  bool
}

func (p *person) run(size, file string, command []string) (status int, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	var ws pty.Winsize
	if _, err := fmt.Sscanf(size, "%dx%d", &ws.Rows, &ws.Cols); err != nil {
		return 0, fmt.Errorf("-size: %w", err)
	}
	cmd := exec.Command(command[0], command[1:]...)
	if p.terminal, err = pty.StartWithSize(cmd, &ws); err != nil {
		return 0, err
	}
	p.command = cmd
	var reading sync.WaitGroup
	reading.Go(p.read)
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if err := p.do(lines.Text()); err != nil {
			cmd.Process.Kill()
			return 0, err
		}
	}
	err = cmd.Wait()
	reading.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

func (p *person) read() {
	buf := make([]byte, 32<<10)
	for {
		n, err := p.terminal.Read(buf)
		os.Stdout.Write(buf[:n])
		p.more.L.Lock()
		p.output = append(p.output, buf[:n]...)
		p.ended = err != nil
		p.more.Broadcast()
		p.more.L.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *person) do(line string) error {
	verb, rest, _ := strings.Cut(line, " ")
	switch verb {
	case "", "#":
		return nil
	case "expect":
		return p.expect(rest)
	case "type":
		_, err := io.WriteString(p.terminal, keys(rest))
		return err
	case "press":
		_, err := io.WriteString(p.terminal, rest)
		return err
	case "size":
		var ws pty.Winsize
		if _, err := fmt.Sscanf(rest, "%d %d", &ws.Rows, &ws.Cols); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
		return pty.Setsize(p.terminal, &ws)
	case "hangup":
		return p.command.Process.Signal(syscall.SIGHUP)
	}
	return fmt.Errorf("%s: no such thing to do", line)
}

func (p *person) expect(pattern string) error {
	re, err := regexp.Compile("(?m)" + pattern)
	if err != nil {
		return err
	}
	tooLong := false
	timer := time.AfterFunc(time.Minute, func() {
		p.more.L.Lock()
		defer p.more.L.Unlock()
		tooLong = true
		p.more.Broadcast()
	})
	defer timer.Stop()
	p.more.L.Lock()
	defer p.more.L.Unlock()
	for {
		if at := re.FindIndex(p.output); at != nil {
			p.output = p.output[at[1]:]
			return nil
		}
		if p.ended || tooLong {
			return fmt.Errorf("expect %s: there is only %q", pattern, p.output)
		}
		p.more.Wait()
	}
}

// keys returns the bytes that a terminal sends for text.
func keys(text string) string {
	if len(text) == 2 && text[0] == '^' {
		return string(text[1] & 0x1f)
	}
	return text + "\r"
}
