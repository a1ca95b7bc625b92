package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/creack/pty"
)

// keystroke measures the time from a byte written to the stock client's terminal
// until its echo is read from there. The byte passes the client, the server, the
// remote terminal in raw mode, and cat.
func (b *bench) keystroke(ctx context.Context) ([]row, error) {
	const block = 100 // keystrokes per turn of a server
	servers := []server{b.sshd, b.gateway}
	var terminals []*terminal
	for _, s := range servers {
		t, err := b.openTerminal(ctx, s)
		if err != nil {
			return nil, err
		}
		defer t.close()
		terminals = append(terminals, t)
	}
	got := make([]samples, len(servers))
	for turn := 0; len(got[0]) < b.keystrokes; turn++ {
		for i, t := range terminals {
			for range block {
				took, err := t.echo()
				if err != nil {
					return nil, fmt.Errorf("keystroke to %s: %w", servers[i].name, err)
				}
				if turn > 0 { // the first block is a warm-up
					got[i] = append(got[i], float64(took.Microseconds()))
				}
			}
		}
	}
	return []row{{
		What: "keystroke echo", Goal: "<= 1.5 x", Unit: "µs", SSHD: got[0], Sallyport: got[1],
		Note: "ssh -tt, raw remote terminal, cat",
	}}, nil
}

// A terminal is a stock client in a pseudo-terminal of this process.
type terminal struct {
	cmd *exec.Cmd
	pty *os.File
	buf [1]byte
}

func (b *bench) openTerminal(ctx context.Context, s server) (*terminal, error) {
	const ready = "READY-TO-ECHO"
	// The remote shell composes the word, so an echo of the command does not
	// contain it.
	cmd := b.ssh(ctx, s, "-tt", "stty raw -echo; printf READY-; printf TO-ECHO; exec cat")
	file, err := pty.Start(cmd)
	if err != nil {
		return nil, fmt.Errorf("ssh to %s in a terminal: %w", s.name, err)
	}
	t := &terminal{cmd: cmd, pty: file}
	file.SetReadDeadline(time.Now().Add(20 * time.Second))
	var seen []byte
	for !bytes.HasSuffix(seen, []byte(ready)) {
		if _, err := file.Read(t.buf[:]); err != nil {
			t.close()
			return nil, fmt.Errorf("ssh to %s in a terminal: %w after %q", s.name, err, seen)
		}
		seen = append(seen, t.buf[0])
	}
	return t, nil
}

// echo writes one byte and returns when its echo has arrived.
func (t *terminal) echo() (time.Duration, error) {
	t.pty.SetDeadline(time.Now().Add(10 * time.Second))
	t.buf[0] = 'x'
	began := time.Now()
	if _, err := t.pty.Write(t.buf[:]); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(t.pty, t.buf[:]); err != nil {
		return 0, err
	}
	took := time.Since(began)
	if t.buf[0] != 'x' {
		return 0, fmt.Errorf("%q came back", t.buf)
	}
	return took, nil
}

func (t *terminal) close() error {
	t.cmd.Process.Kill()
	return errors.Join(t.pty.Close(), t.cmd.Wait())
}

// connect measures a whole run of the stock client: start, key exchange, login,
// one session with the command true, and the end. The bastion runs already.
func (b *bench) connect(ctx context.Context) ([]row, error) {
	servers := []server{b.sshd, b.gateway}
	got := make([]samples, len(servers))
	var gatewayCPU samples
	for run := range b.connects + 1 {
		for i, s := range servers {
			cpu0, err := cpuSeconds(b.gateway.pid)
			if err != nil {
				return nil, err
			}
			began := time.Now()
			if out, err := b.ssh(ctx, s, "true").CombinedOutput(); err != nil {
				return nil, fmt.Errorf("ssh %s true: %w\n%s", s.name, err, out)
			}
			if run == 0 {
				continue // a warm-up
			}
			got[i] = append(got[i], time.Since(began).Seconds()*1000)
			if s.name != b.gateway.name {
				continue
			}
			// The server processes the end of the connection after ssh has exited.
			if err := sleep(ctx, 20*time.Millisecond); err != nil {
				return nil, err
			}
			cpu1, err := cpuSeconds(b.gateway.pid)
			if err != nil {
				return nil, err
			}
			gatewayCPU = append(gatewayCPU, (cpu1-cpu0)*1000)
		}
	}
	// A sample is a multiple of 10 ms, the clock's tick, so only the mean of all
	// samples is meaningful.
	return []row{{
		What: "connect + true", Unit: "ms", SSHD: got[0], Sallyport: got[1],
		Note: "to a running bastion",
	}, {
		What: "gateway CPU for connect + true", Goal: "<= 5 ms", Unit: "ms", Sallyport: samples{gatewayCPU.mean()},
		Note: fmt.Sprintf("mean of %d, to a running bastion", len(gatewayCPU)),
	}}, nil
}
