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
// another. The exceptions are one that nobody can log in to, since the next attempt
// would be given it again, and one that somebody wants stopped.
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
	// ID names the task at its launcher. It is never used again for another
	// task.
	ID string
	// Principal is what login certificates must name to open it; empty means
	// ID. Some launchers learn the ID only when the agent has been told its
	// principal.
	Principal string
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
	// ErrNoAnswer says that a bastion runs, as far as is known, and does not
	// answer.
	ErrNoAnswer = errors.New("bastion does not answer")
	// ErrHostKey says that something which is not the bastion answers at its
	// address.
	ErrHostKey = errors.New("bastion has the wrong host key")
	// ErrCapacity says that there is no room for a bastion just now.
	ErrCapacity = errors.New("no capacity to start a bastion")
	// ErrQuota says that as many bastions run as the account may have.
	ErrQuota = errors.New("the account's quota is used up")
	// ErrTooMany says that the user has as many bastions as she may.
	ErrTooMany = errors.New("the user has as many bastions as permitted")
	// ErrBusy says that bastions are being started faster than is allowed.
	ErrBusy = errors.New("too many starts at once")
	// ErrPlatform says that what a bastion runs on, its network interface or
	// disk, was not got ready in time.
	ErrPlatform = errors.New("the platform did not get ready")
	// ErrImage says that the bastion's image cannot be had.
	ErrImage = errors.New("the image cannot be pulled")
	// ErrSecrets says that secrets its definition names cannot be had.
	ErrSecrets = errors.New("the secrets cannot be had")
	// ErrDenied says that the gateway lacks a permission.
	ErrDenied = errors.New("not permitted to start a bastion")
	// ErrConfig says that what the profile names does not exist or does not
	// fit.
	ErrConfig = errors.New("the profile does not fit")
	// ErrStarting says that a bastion is being started or stopped just now.
	ErrStarting = errors.New("the bastion is being started or stopped")
	// ErrConflict is what Ledger.Swap returns when somebody else was first.
	ErrConflict = errors.New("ledger entry has changed")
)

// A Launch is the request to start one generation of an owner's bastion.
type Launch struct {
	Owner      Owner
	Generation int64
	// Attempt counts the generations that were used up in vain just before
	// this one, for the same start: from one on, it may be worth while to ask
	// for another zone, or another kind of capacity.
	Attempt int
	// Idle is how long the bastion lives on after its last connection, and
	// MaxLife how long it lives at most.
	Idle, MaxLife time.Duration
}

// A Launcher starts bastions and says which are alive. Methods must be safe for
// concurrent use, and are expected to retry transient errors themselves.
type Launcher interface {
	// Launch starts a bastion and returns once it has an address. Two
	// Launches of one owner and generation, even by different processes,
	// return the same task. An error that wraps ErrGone says that the
	// generation is used up: its task has ended, or cannot be started any
	// more. A Launcher that knows that the task of the generation asked for
	// ended before the call may start a later one instead; Task.Generation
	// says which. Ending ctx gives up waiting and need not stop what was
	// started; the Task that comes with an error has an ID if something was.
	Launch(ctx context.Context, l Launch) (Task, error)

	// Alive returns nil if the task runs, ErrGone (wrapped) if it has ended
	// for good, and another error if that is not known.
	Alive(ctx context.Context, owner Owner, taskID string) error

	// Stop ends the task. It returns nil once the task is certain to end
	// soon, and lets nobody in any more; also if it ended long ago.
	Stop(ctx context.Context, owner Owner, taskID string) error

	// List returns the tasks that run or are being started, as far as it can
	// tell: it may be some seconds late. A gateway calls it when it starts, to
	// adopt what an earlier one left running, and to find what nobody owns.
	// What was found is returned with an error, too.
	List(ctx context.Context) ([]OwnedTask, error)
}

// An OwnedTask is a task with what its launcher remembers of its start.
type OwnedTask struct {
	Owner Owner
	Task  Task // Addr is empty while it is being started
	// Started is when it was launched; zero if that is not known.
	Started time.Time
	// MaxLife is what its agent was told, if that is known; zero means its
	// profile's.
	MaxLife time.Duration
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
	// Since is when State became what it is; zero if that is not known, as
	// when it is Idle. It is for people: nothing depends on it.
	Since time.Time
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
