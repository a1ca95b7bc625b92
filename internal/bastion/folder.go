package bastion

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// Folder is the ledger of a single gateway that remembers across restarts: a
// file for each owner. It keeps the host keys that bastions have shown, and the
// generations that are used up. [OpenFolder] makes one.
type Folder struct {
	Memory
	dir  string
	lock *os.File
}

// OpenFolder opens the ledger in dir, which is made if missing, for the gateway's
// own user only. There can be one at a time: another process that has it open is
// an error. A file that cannot be read is logged and passed over, which is no
// worse than an owner who is not known.
func OpenFolder(dir string, log *slog.Logger) (*Folder, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the ledger: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the ledger: %w", err)
	}
	// The kernel gives it up when the process ends, however it ends.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = errors.New("another gateway uses it; two gateways need a state_dir each, and then a deployment each")
		}
		return nil, fmt.Errorf("opening the ledger %s: %w", dir, err)
	}
	f := &Folder{dir: dir, lock: lock}
	f.entries = map[Owner]Entry{}
	files, err := os.ReadDir(dir)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("opening the ledger: %w", err)
	}
	for _, file := range files {
		name, isEntry := strings.CutSuffix(file.Name(), ".json")
		if !isEntry {
			continue
		}
		owner, entry, err := readEntry(filepath.Join(dir, file.Name()), name)
		if err != nil {
			log.Warn("passing over an entry of the ledger", "file", file.Name(), "err", err)
			continue
		}
		// Whoever was starting it has ended.
		entry.Lease = time.Time{}
		f.entries[owner] = entry
	}
	return f, nil
}

// Close lets another process open the ledger.
func (f *Folder) Close() error { return f.lock.Close() }

// Swap implements [Ledger]. The new entry is on disk when it returns.
func (f *Folder) Swap(_ context.Context, owner Owner, old, new Entry) (Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	made, err := f.next(owner, old, new)
	if err != nil {
		return Entry{}, err
	}
	if err := f.write(owner, made); err != nil {
		return Entry{}, fmt.Errorf("writing the ledger: %w", err)
	}
	f.entries[owner] = made
	return made, nil
}

// savedEntry is an Entry in a file.
type savedEntry struct {
	Version    int64
	Generation int64
	State      State
	Task       struct {
		ID, Principal, Addr, HostKey string
		Generation                   int64
	}
	Lease time.Time
	Nonce string
}

func (f *Folder) write(owner Owner, e Entry) error {
	saved := savedEntry{Version: e.Version, Generation: e.Generation, State: e.State, Lease: e.Lease, Nonce: e.Nonce}
	saved.Task.ID, saved.Task.Principal, saved.Task.Addr, saved.Task.Generation = e.Task.ID, e.Task.Principal, e.Task.Addr, e.Task.Generation
	if e.Task.HostKey != nil {
		saved.Task.HostKey = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(e.Task.HostKey)))
	}
	text, err := json.Marshal(saved)
	if err != nil {
		return err
	}
	// There is the old entry or the new one, wherever this is cut off.
	name := filepath.Join(f.dir, url.PathEscape(owner.String())+".json")
	tmp, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = tmp.Write(append(text, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), name); err != nil {
		return err
	}
	// Until then, a machine that loses its power may have the old one again
	// (fsync(2)).
	dir, err := os.Open(f.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// maxEntry bounds a file of the ledger.
const maxEntry = 64 << 10

func readEntry(path, name string) (Owner, Entry, error) {
	text, err := url.PathUnescape(name)
	if err != nil {
		return Owner{}, Entry{}, err
	}
	user, profile, ok := strings.Cut(text, "+")
	if !ok || user == "" || profile == "" {
		return Owner{}, Entry{}, errors.New("the name is not that of an owner")
	}
	if info, err := os.Stat(path); err != nil {
		return Owner{}, Entry{}, err
	} else if info.Size() > maxEntry || !info.Mode().IsRegular() {
		return Owner{}, Entry{}, fs.ErrInvalid
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Owner{}, Entry{}, err
	}
	e, err := parseEntry(data)
	return Owner{User: user, Profile: profile}, e, err
}

func parseEntry(data []byte) (Entry, error) {
	var s savedEntry
	if err := json.Unmarshal(data, &s); err != nil {
		return Entry{}, err
	}
	e := Entry{Version: s.Version, Generation: s.Generation, State: s.State, Lease: s.Lease, Nonce: s.Nonce}
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
		return Entry{}, errors.New("it makes no sense")
	case e.State == Running && (e.Task.ID == "" || e.Task.Addr == ""):
		return Entry{}, errors.New("it names no task")
	}
	return e, nil
}
