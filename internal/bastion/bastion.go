// Package bastion finds or starts a user's personal bastion, waits for it, and
// connects to it. [Dialer.Dial] is the way in.
//
// A [Ledger] stores, for each [Owner], the state and the task of the present
// bastion. A [Launcher] starts, finds, lists and stops tasks.
//
// # When a bastion is started
//
// [Dialer.Dial] starts a bastion if the ledger does not have one as Running, or
// if the launcher reports that the task in the ledger has ended:
//
//  1. The limits are checked: bastions per user, and starts per user and time.
//  2. The gateway claims the next generation in the ledger by compare-and-swap:
//     Idle, generation n, becomes Starting, generation n+1, with a lease. If
//     another gateway was first, this one waits for it.
//  3. [Launcher.Launch] starts the task. A Launcher starts at most one task for
//     each generation, however often it is called.
//  4. The gateway connects until the agent answers, and logs in once, without
//     permissions, to prove that the bastion works.
//  5. The ledger entry becomes Running, with the task, its address and its host
//     key. Everybody who waits connects.
//
// If the task ends during 3 or 4, the start is repeated once, with the next
// generation.
//
// # When a bastion ends
//
// The agent in it exits, Idle after its last connection or MaxLife after its
// start. The next Dial finds that the task has ended, sets the entry to Idle, and
// starts another. This package stops a bastion in these cases only:
//
//   - Nobody can log in to it after a start, or it has not answered for 45
//     seconds although its launcher says that it runs, or another host key
//     answers at its address. Otherwise, each later login would be led there.
//   - [Dialer.Stop] is called.
//   - [Dialer.Sweep] finds that it has outlived MaxLife, is not its owner's
//     present one, or belongs to a profile that is no longer configured.
//
// # If the gateway is killed
//
// Before 2, nothing has changed. After 2, the lease ends; the next Dial, on any
// gateway, launches the same generation again. After 3, that Launch returns the
// task which already runs. After 4, the same; the bastion has no connection and
// ends by itself if nobody comes. After 5, the bastion runs on, and its sessions
// as the agent decides; the next Dial connects to it. While a bastion is being
// stopped, its entry is Starting with a lease, so a kill at that point is like
// one after 2.
//
// If the ledger is lost, as [Memory] is with its process, [Dialer.Adopt] enters
// the tasks that the launchers list. Until a listing has succeeded, no bastion is
// started for an owner that the ledger does not know.
package bastion

import (
	"context"
	"log/slog"
	"time"

	"golang.org/x/crypto/ssh"
)

// An Owner is a user and a profile. There is at most one bastion for each.
type Owner struct {
	User, Profile string
}

// String returns user+profile, the form people type before the "@".
func (o Owner) String() string { return o.User + "+" + o.Profile }

// LogValue implements [slog.LogValuer].
func (o Owner) LogValue() slog.Value { return slog.StringValue(o.String()) }

// A Task is one run of a bastion.
type Task struct {
	// ID is the launcher's name for the task. IDs are not reused.
	ID string
	// Principal is the name that login certificates must have to open the
	// bastion; empty means ID. Some launchers learn the ID only after the agent
	// has been told its principal.
	Principal string
	// Generation is the one that the task was launched for.
	Generation int64
	// Addr is the address of the agent's SSH server: "host:port", or a Unix
	// socket on this machine (see package unixsock).
	Addr string
	// HostKey is the agent's host key, if the launcher learned it over a
	// trusted channel; nil if it must be learned at the first contact.
	HostKey ssh.PublicKey
	// Usage is for the audit log. Ledgers do not store it.
	Usage Usage
}

// Usage is what a platform bills for a task, as its launcher reports it. Zero fields
// are unknown.
type Usage struct {
	// Platform is "fargate" or "local".
	Platform string
	// Spot says that the task runs on spare capacity.
	Spot bool
	// CPU is in units of 1/1024 vCPU, Memory in MiB, EphemeralStorage in GiB.
	CPU, Memory, EphemeralStorage int
	// Architecture is "x86_64" or "arm64".
	Architecture string
	// From and Until are the times between which the task is billed, by the clock
	// of the platform.
	From, Until time.Time
}

// A Launch is the request to start one generation of an owner's bastion.
type Launch struct {
	Owner      Owner
	Generation int64
	// Attempt is the number of generations that have failed before, within the
	// same start. From 1 on, a Launcher may try another zone, or another kind
	// of capacity.
	Attempt int
	// Idle is the time from the agent's last connection to its exit, and
	// MaxLife the time from its start.
	Idle, MaxLife time.Duration
	// Forwarding holds the agent's settings of remote forwards.
	Forwarding Forwarding
}

// Forwarding holds the settings of remote forwards, with the names and meanings of
// sshd_config(5). The zero value has sshd's defaults.
type Forwarding struct {
	// GatewayPorts is "no", "yes" or "clientspecified"; empty means "no".
	GatewayPorts string
	// StreamLocalBindUnlink removes an existing file before a socket is bound.
	StreamLocalBindUnlink bool
	// StreamLocalBindMask is the umask for sockets, in octal; empty means 0177.
	StreamLocalBindMask string
}

// Flags returns the name and value of each bastion-agent flag that is not at its
// default, always in the same order.
func (f Forwarding) Flags() (flags [][2]string) {
	if f.GatewayPorts != "" && f.GatewayPorts != "no" {
		flags = append(flags, [2]string{"gateway-ports", f.GatewayPorts})
	}
	if f.StreamLocalBindUnlink {
		flags = append(flags, [2]string{"stream-local-bind-unlink", "true"})
	}
	if f.StreamLocalBindMask != "" {
		flags = append(flags, [2]string{"stream-local-bind-mask", f.StreamLocalBindMask})
	}
	return flags
}

// A Launcher starts, finds, lists and stops tasks. Methods must be safe for
// concurrent use, and are expected to retry transient errors themselves.
type Launcher interface {
	// Launch starts a bastion and returns once it has an address. Two
	// Launches of one owner and generation, even by different processes,
	// return the same task.
	//
	// An error that wraps ErrGone says that the generation is used up: its
	// task has ended, or can no longer be started. If a Launcher knows that the
	// task of the generation ended before the call, it may start a later one
	// instead; Task.Generation says which. When ctx ends, Launch returns and
	// need not stop a task that it has started. A Task with an ID that comes
	// with an error may be running.
	Launch(ctx context.Context, l Launch) (Task, error)

	// Alive returns nil if the task runs, ErrGone (wrapped) if it has ended
	// for good, and another error if that is not known.
	Alive(ctx context.Context, owner Owner, taskID string) error

	// Stop ends the task. It returns nil once the task is certain to end soon
	// and accepts no more logins, also if it ended long ago.
	Stop(ctx context.Context, owner Owner, taskID string) error

	// List returns the tasks that run or are being started, as far as it
	// knows: it may be some seconds late, and repeat itself. It may include
	// tasks of other profiles, configured or not. With an error, the list is
	// incomplete.
	List(ctx context.Context) ([]OwnedTask, error)
}

// An OwnedTask is a task as its launcher lists it.
type OwnedTask struct {
	Owner Owner
	Task  Task // Addr is empty while the task is being started
	// Started is the time of the launch; zero if the launcher does not know it.
	Started time.Time
	// MaxLife is the value that the agent was given; zero means its profile's.
	MaxLife time.Duration
}
