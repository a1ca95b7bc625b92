package local

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// maxFile bounds, in bytes, what is read of a task.json or an agent's report.
const maxFile = 4096

// A folder holds what is known of one owner's bastion on this machine.
type folder struct {
	owner bastion.Owner
	path  string
}

// names are what user and profile must look like to be part of a file name and
// of a command line. No "+" is in them: it divides the two.
var names = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}$`)

// folder returns owner's folder, which need not exist.
func (l *Launcher) folder(owner bastion.Owner) (folder, error) {
	if !names.MatchString(owner.User) || !names.MatchString(owner.Profile) {
		return folder{}, fmt.Errorf("%w: %q is not a name for a bastion", bastion.ErrNoAccount, owner)
	}
	return folder{owner: owner, path: filepath.Join(l.Dir, owner.String())}, nil
}

func (f folder) file(name string) string { return filepath.Join(f.path, name) }

func (f folder) idPrefix() string { return "local-" + f.owner.String() + "-" }

// newID makes the name of a task. The random part keeps it from ever being used
// again, even if the folder is deleted and generations start over.
func (f folder) newID(generation int64) string {
	var b [4]byte
	rand.Read(b[:])
	return fmt.Sprintf("%s%d-%s", f.idPrefix(), generation, hex.EncodeToString(b[:]))
}

// lock waits for launch.lock and returns what gives it up.
func (f folder) lock(ctx context.Context) (unlock func(), err error) {
	file, err := os.OpenFile(f.file("launch.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		// The blocking form could not be given up when ctx ends.
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			file.Close()
			return nil, fmt.Errorf("locking %s: %w", file.Name(), err)
		}
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			file.Close()
			return nil, context.Cause(ctx)
		}
	}
}

// agentLives reports whether an agent, or a launcher about to start one, holds
// agent.lock.
func (f folder) agentLives() (bool, error) {
	file, err := os.Open(f.file("agent.lock"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	// A shared lock, for two who look at the same time must not take each
	// other for an agent.
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if err == syscall.EWOULDBLOCK {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("locking %s: %w", file.Name(), err)
	}
	return false, nil
}

// takeAgentLock returns agent.lock, locked. The caller holds launch.lock and
// knows that no agent lives; so it waits only for those who are just looking.
func (f folder) takeAgentLock() (*os.File, error) {
	file, err := os.OpenFile(f.file("agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX)
		if err == nil {
			return file, nil
		}
		if err != syscall.EINTR {
			file.Close()
			return nil, fmt.Errorf("locking %s: %w", file.Name(), err)
		}
	}
}

// A record is what task.json holds: the owner's present or last task.
type record struct {
	ID         string `json:"id"`
	Generation int64  `json:"generation"`
	ready
}

// ready is what an agent reports, as one line of JSON, when it has begun to
// listen. It is the zero value in the record of a task that did not get so far.
type ready struct {
	Addr    string `json:"addr,omitempty"`
	HostKey string `json:"host_key,omitempty"` // as in authorized_keys
}

// task returns a record that is complete as a task.
func (r record) task() bastion.Task {
	key, _ := r.hostKey() // checked when it was parsed
	return bastion.Task{ID: r.ID, Generation: r.Generation, Addr: r.Addr, HostKey: key}
}

func (r ready) hostKey() (ssh.PublicKey, error) {
	key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(r.HostKey))
	if err != nil {
		return nil, err
	}
	if len(rest) > 0 || key.Type() != ssh.KeyAlgoED25519 {
		return nil, fmt.Errorf("host key %q is not one ssh-ed25519 key", r.HostKey)
	}
	return key, nil
}

func (r ready) check() error {
	if addr, err := netip.ParseAddrPort(r.Addr); err != nil {
		return err
	} else if !addr.Addr().IsLoopback() || addr.Port() == 0 {
		return fmt.Errorf("address %q is not on this machine", r.Addr)
	}
	_, err := r.hostKey()
	return err
}

// parseReady reads an agent's report.
func parseReady(line []byte) (ready, error) {
	var r ready
	if err := json.Unmarshal(line, &r); err != nil {
		return ready{}, fmt.Errorf("reading the agent's report: %w", err)
	}
	if err := r.check(); err != nil {
		return ready{}, fmt.Errorf("reading the agent's report: %w", err)
	}
	return r, nil
}

// parseRecord reads a task.json.
func parseRecord(data []byte) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, err
	}
	if r.ID == "" || r.Generation < 1 {
		return record{}, errors.New("no id, or no generation")
	}
	if r.ready != (ready{}) {
		if err := r.check(); err != nil {
			return record{}, err
		}
	}
	return r, nil
}

// errGarbage says that a task.json makes no sense, as against one that cannot be
// read at the moment.
var errGarbage = errors.New("not the record of a task")

// read returns the owner's present or last task, or the zero record if there
// never was one. The error wraps errGarbage if there is no hope of reading it.
func (f folder) read() (record, error) {
	file, err := os.Open(f.file("task.json"))
	if errors.Is(err, os.ErrNotExist) {
		return record{}, nil
	}
	if err != nil {
		return record{}, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxFile))
	if err != nil {
		return record{}, err
	}
	r, err := parseRecord(data)
	if err != nil {
		return record{}, fmt.Errorf("%w: %s: %w", errGarbage, file.Name(), err)
	}
	return r, nil
}

// write replaces task.json, for good when it returns. The caller holds
// launch.lock.
func (f folder) write(r record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	temp, err := os.OpenFile(f.file("task.json.new"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = temp.Write(append(data, '\n'))
	err = errors.Join(err, temp.Sync(), temp.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), f.file("task.json")); err != nil {
		return err
	}
	dir, err := os.Open(f.path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
