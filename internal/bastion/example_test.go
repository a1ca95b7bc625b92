package bastion_test

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"net"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
)

// The first Dial starts alice's bastion, the second finds it in the ledger. After a
// Stop, the next Dial starts another.
func Example() {
	fleetKey := newSigner()
	launcher := &oneTask{fleetKey: fleetKey.PublicKey()}
	dialer := &bastion.Dialer{
		Settings: bastion.Settings{
			Profiles: map[string]bastion.Profile{"default": {
				Launcher:       launcher,
				ProfileOptions: bastion.ProfileOptions{Idle: 15 * time.Minute, MaxLife: 12 * time.Hour},
			}},
			FleetKeys: []ssh.Signer{fleetKey},
		},
		Ledger: &bastion.Memory{},
		Log:    slog.New(slog.DiscardHandler),
	}

	ctx := context.Background()
	alice := identity.Identity{User: "alice", Profile: "default"}
	dial := func() {
		conn, err := dialer.Dial(ctx, alice, func(starting bool) { fmt.Println("waiting; this call starts it:", starting) })
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("connected to", conn.Task.ID)
		conn.Close()
	}
	dial()
	dial()
	if _, err := dialer.Stop(ctx, bastion.Owner{User: "alice", Profile: "default"}, "example"); err != nil {
		fmt.Println(err)
	}
	dial()
	launcher.Stop(ctx, bastion.Owner{}, "")

	// Output:
	// waiting; this call starts it: true
	// connected to task-1
	// connected to task-1
	// waiting; this call starts it: true
	// connected to task-2
}

// oneTask is a Launcher that runs one task at a time: an SSH server on the loopback
// interface that accepts the fleet's certificates and serves no channels.
type oneTask struct {
	fleetKey ssh.PublicKey
	task     bastion.Task
	listener net.Listener
}

func (o *oneTask) Launch(_ context.Context, l bastion.Launch) (bastion.Task, error) {
	var err error
	if o.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return bastion.Task{}, err
	}
	id, hostKey := fmt.Sprint("task-", l.Generation), newSigner()
	o.task = bastion.Task{ID: id, Generation: l.Generation, Addr: o.listener.Addr().String(), HostKey: hostKey.PublicKey()}
	agent := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		_, err := sshca.Verifier{Fleet: []ssh.PublicKey{o.fleetKey}, Principal: id, Now: time.Now}.Verify(key)
		return nil, err
	}}
	agent.AddHostKey(hostKey)
	go func(ln net.Listener) {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go ssh.NewServerConn(c, agent)
		}
	}(o.listener)
	return o.task, nil
}

func (o *oneTask) Alive(context.Context, bastion.Owner, string) error {
	if o.listener == nil {
		return bastion.ErrGone
	}
	return nil
}

func (o *oneTask) Stop(context.Context, bastion.Owner, string) error {
	err := o.listener.Close()
	o.listener = nil
	return err
}

func (o *oneTask) List(context.Context) ([]bastion.OwnedTask, error) { return nil, nil }

func newSigner() ssh.Signer {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		panic(err)
	}
	signer, err := ssh.NewSignerFromSigner(key)
	if err != nil {
		panic(err)
	}
	return signer
}
