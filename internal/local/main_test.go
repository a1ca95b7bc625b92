package local

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/unixsock"
)

// TestMain makes the test binary two other programs as well: with "serve" it is
// a small bastion-agent, with "launch" a gateway that launches one bastion.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "serve" || os.Args[1] == "launch") {
		time.AfterFunc(2*time.Minute, func() { os.Exit(99) }) // also if the test hangs
	}
	switch {
	case len(os.Args) > 1 && os.Args[1] == "serve":
		if err := agentMain(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			os.Exit(1)
		}
	case len(os.Args) > 1 && os.Args[1] == "launch":
		if err := launchMain(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "launch:", err)
			os.Exit(1)
		}
	default:
		os.Exit(m.Run())
	}
}

// launchMain launches a bastion and prints the task's ID: DIR FLEETKEY MODE.
func launchMain(args []string) error {
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(args[1]))
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	l := &Launcher{Dir: args[0], FleetKeys: []ssh.PublicKey{key}, Options: Options{Agent: self, Account: "nobody"}, Log: slog.New(slog.DiscardHandler)}
	if args[2] != "" {
		l.AcceptEnv = []string{args[2]}
	}
	task, err := l.Launch(context.Background(), launchAlice)
	if err == nil {
		fmt.Println(task.ID)
	}
	return err
}

// agentMain is a bastion-agent that accepts its fleet's certificates and serves no
// channels. --accept-env mode=... selects a fault.
func agentMain(args []string) error {
	var accept []string
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	flags.Func("accept-env", "", func(s string) error { accept = append(accept, s); return nil })
	listen := flags.String("listen", "", "")
	flags.String("owner", "", "")
	flags.String("account", "", "")
	fleet := flags.String("fleet-key", "", "")
	principal := flags.String("principal", "", "")
	flags.Duration("idle", 0, "")
	flags.Duration("max-life", 0, "")
	readyFD := flags.Int("ready-fd", -1, "")
	lockFD := flags.Int("lock-fd", -1, "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	syscall.CloseOnExec(*lockFD)
	report := os.NewFile(uintptr(*readyFD), "ready")
	mode := func(name string) bool { return slices.Contains(accept, "mode="+name) }
	switch {
	case mode("crash"):
		return fmt.Errorf("cannot read the host key")
	case mode("mute"):
		select {}
	case mode("garbage"):
		fmt.Fprintln(report, `{"addr":"192.0.2.1:22"}`)
		select {}
	case mode("flood"):
		for {
			if _, err := report.WriteString(strings.Repeat("x", 1024)); err != nil {
				select {}
			}
		}
	case mode("stubborn"):
		signal.Ignore(syscall.SIGTERM)
	}

	// Tests read this in the agent's log.
	dir, _ := os.Getwd()
	sid, _, _ := syscall.RawSyscall(syscall.SYS_GETSID, 0, 0, 0)
	fmt.Fprintf(os.Stderr, "dir=%s env=%q leader=%t\n", dir, os.Environ(), int(sid) == os.Getpid())

	fleetKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(*fleet))
	if err != nil {
		return err
	}
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	host, err := ssh.NewSignerFromSigner(priv)
	if err != nil {
		return err
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		_, err := sshca.Verifier{Fleet: []ssh.PublicKey{fleetKey}, Principal: *principal}.Verify(key)
		return &ssh.Permissions{}, err
	}}
	config.AddHostKey(host)
	path, _ := unixsock.Path(*listen)
	ln, err := unixsock.Listen(path)
	if err != nil {
		return err
	}
	err = json.NewEncoder(report).Encode(map[string]string{
		"addr":     ln.Addr().String(),
		"host_key": strings.TrimSpace(string(ssh.MarshalAuthorizedKey(host.PublicKey()))),
	})
	if err != nil {
		return err // the launcher has exited
	}
	report.Close()
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, chans, reqs, err := ssh.NewServerConn(c, config)
			if err != nil {
				return
			}
			go ssh.DiscardRequests(reqs)
			for ch := range chans {
				ch.Reject(ssh.Prohibited, "")
			}
		}()
	}
}

var (
	alice       = bastion.Owner{User: "alice", Profile: "default"}
	launchAlice = bastion.Launch{Owner: alice, Generation: 1, Idle: 15 * time.Minute, MaxLife: 12 * time.Hour}
)
