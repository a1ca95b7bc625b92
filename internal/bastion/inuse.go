package bastion

import (
	"context"
	"errors"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// askTimeout limits the login to a bastion that is to be stopped.
const askTimeout = 5 * time.Second

// errInUse says that a task must not be stopped, because it has connections.
var errInUse = errors.New("it has connections")

// free returns nil if a task, which is not in the ledger, has no connections of
// this gateway or another, and will have none: its agent has agreed to stop, or
// does not answer while there is no other gateway. It returns errInUse if the task
// has connections. After an error, the task can be entered as before.
func (b *bastion) free(ctx context.Context, task Task) (err error) {
	refusal := b.conns.refuse(task.ID)
	defer func() {
		if err != nil {
			b.conns.accept(task.ID, refusal)
		}
	}()
	if b.conns.exist(task.ID) {
		return errInUse
	}
	agreed, err := b.askToStop(ctx, task)
	switch {
	case err != nil:
		b.log.Debug("the agent does not answer whether it is in use", "task", task.ID, "err", err)
		return b.checkAlone(ctx)
	case !agreed:
		return errInUse
	}
	return nil
}

// checkAlone returns nil if no other gateway may have connections.
func (b *bastion) checkAlone(ctx context.Context) error {
	if b.alone == nil {
		return nil
	}
	return b.alone(ctx)
}

// askToStop logs in to a task without any permission and asks its agent to stop if
// it has no other connections.
func (b *bastion) askToStop(ctx context.Context, task Task) (agreed bool, err error) {
	if task.Addr == "" {
		return false, errors.New("the task has no address")
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	nobody := identity.Identity{User: b.owner.User, Profile: b.owner.Profile, ConnID: "sweep"}
	conn, err := b.loginAs(ctx, task, nobody, func(*Conn) bool { return true })
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	request := sshmsg.GlobalRequest{Type: "stop-if-unused@sallyport", WantReply: true}
	if err := conn.WritePacket(request.Append(nil)); err != nil {
		return false, err
	}
	if err := conn.Flush(); err != nil {
		return false, err
	}
	for {
		packet, err := conn.ReadPacket()
		if err != nil {
			return false, err
		}
		switch packet[0] {
		case sshmsg.NumRequestSuccess:
			return true, nil
		case sshmsg.NumRequestFailure:
			return false, nil
		}
		// The agent may announce host keys, or ask whether this end is alive.
	}
}
