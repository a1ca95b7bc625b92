package bastion

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/durable"
)

// Folder is a ledger on disk: a file for each owner, with the state, the generation and
// the pinned host key. Processes of one machine may share it, as a draining gateway
// and its successor do. [OpenFolder] makes one.
type Folder struct {
	dir string
	log *slog.Logger
	// users is locked shared while the Folder is open, and exclusively by a
	// process that checks whether it is the only one.
	users *os.File
	// changing is locked while an entry is compared and replaced.
	changing *os.File
	mu       sync.Mutex // guards changing within the process
}

// openTimeout limits the wait for other processes that are opening the folder.
const openTimeout = 5 * time.Second

// OpenFolder opens the ledger in dir, which is made if missing, accessible to the
// gateway's own account only.
func OpenFolder(dir string, log *slog.Logger) (*Folder, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the ledger: %w", err)
	}
	f := &Folder{dir: dir, log: log}
	if err := f.open(); err != nil {
		f.Close()
		return nil, fmt.Errorf("opening the ledger %s: %w", dir, err)
	}
	return f, nil
}

func (f *Folder) open() error {
	var err error
	if f.users, err = os.OpenFile(filepath.Join(f.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if f.changing, err = os.OpenFile(filepath.Join(f.dir, "swap.lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	// If no other process has the folder open, their leases have no holder.
	switch err := durable.TryLock(f.users, syscall.LOCK_EX); {
	case err == nil:
		if err := f.endLeases(); err != nil {
			return err
		}
	case !errors.Is(err, durable.ErrLocked):
		return err
	}
	err = durable.Lock(ctx, f.users, syscall.LOCK_SH)
	if ctx.Err() != nil {
		err = errors.New("another gateway, of an older version that does not share it, uses it; start this one when that has ended")
	}
	return err
}

// endLeases ends the leases of all entries. Their holders have ended.
func (f *Folder) endLeases() error {
	return f.forEach(func(owner Owner, entry Entry) error {
		if entry.Lease.IsZero() {
			return nil
		}
		entry.Lease = time.Time{}
		return f.write(owner, entry)
	})
}

// forEach calls visit for the entry of each owner, until an error. A file that
// cannot be read is logged and passed over.
func (f *Folder) forEach(visit func(Owner, Entry) error) error {
	files, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	for _, file := range files {
		name, isEntry := strings.CutSuffix(file.Name(), ".json")
		if !isEntry {
			continue
		}
		owner, err := parseOwner(name)
		if err != nil {
			f.log.Warn("skipping a file in the ledger", "file", file.Name(), "err", err)
			continue
		}
		entry, err := f.read(owner)
		if err != nil {
			return err
		}
		if err := visit(owner, entry); err != nil {
			return err
		}
	}
	return nil
}

// Entries returns the entries of all owners.
func (f *Folder) Entries() (map[Owner]Entry, error) {
	entries := make(map[Owner]Entry)
	err := f.forEach(func(owner Owner, entry Entry) error {
		entries[owner] = entry
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the ledger: %w", err)
	}
	return entries, nil
}

// Close closes the ledger.
func (f *Folder) Close() error {
	return errors.Join(f.users.Close(), f.changing.Close())
}

// Get implements [Ledger].
func (f *Folder) Get(_ context.Context, owner Owner) (Entry, error) {
	entry, err := f.read(owner)
	if err != nil {
		return Entry{}, fmt.Errorf("reading the ledger: %w", err)
	}
	return entry, nil
}

// Swap implements [Ledger]. The new entry is on disk when it returns.
func (f *Folder) Swap(ctx context.Context, owner Owner, old, new Entry) (Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := durable.Lock(ctx, f.changing, syscall.LOCK_EX); err != nil {
		return Entry{}, fmt.Errorf("locking the ledger: %w", err)
	}
	defer durable.Unlock(f.changing)
	entry, err := f.read(owner)
	if err != nil {
		return Entry{}, fmt.Errorf("reading the ledger: %w", err)
	}
	made, err := successor(owner, entry, old, new)
	if err != nil {
		return Entry{}, err
	}
	if err := f.write(owner, made); err != nil {
		return Entry{}, fmt.Errorf("writing the ledger: %w", err)
	}
	return made, nil
}

// savedEntry is an Entry as JSON.
type savedEntry struct {
	Version    int64
	Generation int64
	State      State
	Task       struct {
		ID, Principal, Addr, HostKey string
		Generation                   int64
	}
	Since, Lease time.Time
	Nonce        string
}

func (f *Folder) write(owner Owner, e Entry) error {
	saved := savedEntry{Version: e.Version, Generation: e.Generation, State: e.State, Since: e.Since, Lease: e.Lease, Nonce: e.Nonce}
	saved.Task.ID, saved.Task.Principal, saved.Task.Addr, saved.Task.Generation = e.Task.ID, e.Task.Principal, e.Task.Addr, e.Task.Generation
	if e.Task.HostKey != nil {
		saved.Task.HostKey = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(e.Task.HostKey)))
	}
	text, err := json.Marshal(saved)
	if err != nil {
		return err
	}
	return durable.Replace(f.file(owner), append(text, '\n'))
}

// maxEntry limits the size of a file, in bytes.
const maxEntry = 64 << 10

func (f *Folder) file(owner Owner) string {
	return filepath.Join(f.dir, url.PathEscape(owner.String())+".json")
}

// parseOwner returns the owner in a file's name without its suffix.
func parseOwner(name string) (Owner, error) {
	text, err := url.PathUnescape(name)
	if err != nil {
		return Owner{}, err
	}
	user, profile, ok := strings.Cut(text, "+")
	if !ok || user == "" || profile == "" {
		return Owner{}, errors.New("not the name of an owner")
	}
	return Owner{User: user, Profile: profile}, nil
}

// read returns the owner's entry; the zero Entry if there is none. An invalid entry is
// logged and also read as zero, because an unknown owner is handled safely. An error
// says that the entry could not be read.
func (f *Folder) read(owner Owner) (Entry, error) {
	// Without O_NONBLOCK, opening a FIFO would block.
	file, err := os.OpenFile(f.file(owner), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return Entry{}, nil
	}
	if err != nil {
		return Entry{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return Entry{}, err
	}
	var entry Entry
	if info.Mode().IsRegular() && info.Size() <= maxEntry {
		var data []byte
		if data, err = io.ReadAll(io.LimitReader(file, maxEntry)); err != nil {
			return Entry{}, err
		}
		entry, err = parseEntry(data)
	} else {
		err = fs.ErrInvalid
	}
	if err != nil {
		f.log.Warn("ignoring an invalid entry of the ledger", "file", file.Name(), "err", err)
		return Entry{}, nil
	}
	return entry, nil
}

func parseEntry(data []byte) (Entry, error) {
	var s savedEntry
	if err := json.Unmarshal(data, &s); err != nil {
		return Entry{}, err
	}
	e := Entry{Version: s.Version, Generation: s.Generation, State: s.State, Since: s.Since, Lease: s.Lease, Nonce: s.Nonce}
	e.Task = Task{ID: s.Task.ID, Principal: s.Task.Principal, Addr: s.Task.Addr, Generation: s.Task.Generation}
	if s.Task.HostKey != "" {
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.Task.HostKey))
		if err != nil {
			return Entry{}, fmt.Errorf("the host key: %w", err)
		}
		e.Task.HostKey = key
	}
	switch {
	case e.Version < 1, e.Generation < 0, e.State < Idle, e.State > Running:
		return Entry{}, errors.New("invalid version, generation or state")
	case e.State == Running && (e.Task.ID == "" || e.Task.Addr == ""):
		return Entry{}, errors.New("running without a task")
	}
	return e, nil
}
