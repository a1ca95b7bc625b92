// Package bastion finds or starts a user's personal bastion, waits for it, and
// connects to it.
//
// # One bastion per user and profile
//
// A [Ledger] remembers which task is whose. Whoever finds that a user has none
// claims the next generation in it by compare-and-swap; only the winner's
// [Launcher] starts a task, and the others wait for it. A launch that is tried
// again, by the same gateway or by the successor of one that died, names the
// same generation, and a Launcher starts at most one task per generation.
//
// # Who ends a bastion
//
// Not this package: the agent in it does, some time after its last connection.
// A bastion that is found dead is forgotten here, and the next login starts
// another. The exception is one that was just started and that nobody can log
// in to: it is stopped, since the next attempt would be given it again.
package bastion

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"golang.org/x/crypto/ssh"
)

// An Owner is whose a bastion is: a user has one for each profile.
type Owner struct {
	User, Profile string
}

// String returns user+profile, the form people type before the "@".
func (o Owner) String() string { return o.User + "+" + o.Profile }

// LogValue implements [slog.LogValuer].
func (o Owner) LogValue() slog.Value { return slog.StringValue(o.String()) }

// A Task is one running bastion.
type Task struct {
	// ID names the task at its launcher and is the principal of the login
	// certificates that open it. It is never used again for another task.
	ID string
	// Generation is the one the task was launched for.
	Generation int64
	// Addr is the "host:port" the agent's SSH server is reached at.
	Addr string
	// HostKey is the agent's, if the launcher learned it in a way that can be
	// trusted; nil if it has to be learned at the first contact.
	HostKey ssh.PublicKey
}

// What can go wrong with a bastion, for those who must choose a sentence for
// the user. Errors of Launcher and Dialer wrap these where they apply.
var (
	// ErrGone says that a task has ended, or never was.
	ErrGone = errors.New("bastion is gone")
	// ErrNoAccount says that the user has no account on the machine that
	// would run the bastion.
	ErrNoAccount = errors.New("no account for this user")
	// ErrNoProfile says that no profile of that name is configured.
	ErrNoProfile = errors.New("no such profile")
	// ErrTimeout says that a bastion did not become reachable in time.
	ErrTimeout = errors.New("bastion did not start in time")
	// ErrHostKey says that something which is not the bastion answers at its
	// address.
	ErrHostKey = errors.New("bastion has the wrong host key")
	// ErrConflict is what Ledger.Swap returns when somebody else was first.
	ErrConflict = errors.New("ledger entry has changed")
)

// A Launch is the request to start one generation of an owner's bastion.
type Launch struct {
	Owner      Owner
	Generation int64
	// Idle is how long the bastion lives on after its last connection, and
	// MaxLife how long it lives at most.
	Idle, MaxLife time.Duration
}

// A Launcher starts bastions and says which are alive. Methods must be safe for
// concurrent use, and are expected to retry transient errors themselves.
type Launcher interface {
	// Launch starts a bastion and returns once it has an address. Two
	// Launches of one owner and generation, even by different processes,
	// return the same task; if that task has ended, the error wraps ErrGone
	// and another generation must be launched. A Launcher that knows for
	// certain that no task of the owner runs may start a later generation
	// than was asked for instead; Task.Generation says which. Ending ctx
	// gives up waiting and need not stop what was started.
	Launch(ctx context.Context, l Launch) (Task, error)

	// Alive returns nil if the task runs, ErrGone (wrapped) if it has ended
	// for good, and another error if that is not known.
	Alive(ctx context.Context, owner Owner, taskID string) error

	// Stop ends the task. It returns nil once the task has ended for good,
	// also if that was long ago.
	Stop(ctx context.Context, owner Owner, taskID string) error

	// List returns the tasks that run, by owner. A gateway calls it when it
	// starts, to adopt what an earlier one left running.
	List(ctx context.Context) (map[Owner]Task, error)
}

// An Entry is what a ledger remembers of one owner. The zero Entry means that
// the owner never had a bastion.
type Entry struct {
	// Version counts the changes of the entry; Swap sets it.
	Version int64
	// Generation counts the owner's bastions, the present one included.
	Generation int64
	State      State
	// Task is set while State is Running.
	Task Task
	// Lease is until when the one who wrote Starting is expected to have
	// finished; afterwards anybody may launch the same generation again.
	Lease time.Time
	// Nonce is made anew for every Swap, so that one whose reply was lost can
	// be told from somebody else's.
	Nonce string
}

// State is where an owner's present generation is in its life.
type State int

const (
	Idle     State = iota // there is none, or it has ended
	Starting              // somebody is launching it
	Running               // it has an address
)

// A Ledger remembers which task is whose. Methods must be safe for concurrent
// use, by all gateways of a deployment.
type Ledger interface {
	// Get returns the owner's entry as it is now, or the zero Entry.
	Get(ctx context.Context, owner Owner) (Entry, error)

	// Swap replaces the owner's entry, if its version is still that of old,
	// and returns the new entry. Otherwise it changes nothing and returns
	// ErrConflict (wrapped).
	Swap(ctx context.Context, owner Owner, old, new Entry) (Entry, error)
}
