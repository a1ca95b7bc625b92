package bastion

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// An Entry is one owner's in a ledger. The zero Entry means that the owner never
// had a bastion.
type Entry struct {
	// Version counts the changes of the entry; Swap sets it.
	Version int64
	// Generation counts the owner's bastions, the present one included.
	Generation int64
	State      State
	// Task is set while State is Running.
	Task Task
	// Since is the time of the last change of State; zero if unknown or if
	// State is Idle. It is for display only.
	Since time.Time
	// Lease is the time until which other gateways leave a Starting entry
	// alone. Afterwards, any gateway may launch the same generation again.
	Lease time.Time
	// Nonce is new in every Swap. It tells the writer whose reply was lost
	// that the change was its own.
	Nonce string
}

// leased reports whether some gateway is starting or stopping the bastion, as far
// as the ledger knows.
func (e Entry) leased() bool {
	left := time.Until(e.Lease)
	return e.State == Starting && left > 0 && left <= maxLease
}

// State is the state of an owner's present generation.
type State int

const (
	Idle     State = iota // there is none, or it has ended
	Starting              // a gateway launches it, or stops it
	Running               // its agent has accepted a login
)

// A Ledger stores an Entry for each owner. Methods must be safe for concurrent
// use, by all gateways of a deployment.
type Ledger interface {
	// Get returns the owner's current entry, or the zero Entry.
	Get(ctx context.Context, owner Owner) (Entry, error)

	// Swap replaces the owner's entry, if its version is still that of old,
	// and returns the new entry. Otherwise it changes nothing and returns
	// ErrConflict (wrapped).
	Swap(ctx context.Context, owner Owner, old, new Entry) (Entry, error)
}

// Memory is a ledger in the memory of a single gateway; [Dialer.Adopt] restores it
// after a restart. The zero value is ready for use.
type Memory struct {
	mu      sync.Mutex
	entries map[Owner]Entry
}

// Get implements [Ledger].
func (m *Memory) Get(_ context.Context, owner Owner) (Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.entries[owner], nil
}

// Swap implements [Ledger].
func (m *Memory) Swap(_ context.Context, owner Owner, old, new Entry) (Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	made, err := successor(owner, m.entries[owner], old, new)
	if err != nil {
		return Entry{}, err
	}
	if m.entries == nil {
		m.entries = map[Owner]Entry{}
	}
	m.entries[owner] = made
	return made, nil
}

// successor returns new with its version set, if old is the stored entry.
func successor(owner Owner, stored, old, new Entry) (Entry, error) {
	if stored.Version != old.Version {
		return Entry{}, fmt.Errorf("%w: %s is at version %d, not %d", ErrConflict, owner, stored.Version, old.Version)
	}
	new.Version = old.Version + 1
	return new, nil
}
