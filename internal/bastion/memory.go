package bastion

import (
	"context"
	"fmt"
	"sync"
)

// Memory is the ledger of a single gateway. It forgets everything when the
// process ends; [Dialer.Adopt] fills it again. The zero value is ready for use.
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
	made, err := m.next(owner, old, new)
	if err != nil {
		return Entry{}, err
	}
	if m.entries == nil {
		m.entries = map[Owner]Entry{}
	}
	m.entries[owner] = made
	return made, nil
}

// next returns the entry that replaces old. The caller holds mu.
func (m *Memory) next(owner Owner, old, new Entry) (Entry, error) {
	if have := m.entries[owner].Version; have != old.Version {
		return Entry{}, fmt.Errorf("%w: %s is at version %d, not %d", ErrConflict, owner, have, old.Version)
	}
	new.Version = old.Version + 1
	return new, nil
}
