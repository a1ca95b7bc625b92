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
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/durable"
	"github.com/sallyport-ssh/sallyport/internal/unixsock"
)

// maxFile limits the size of a task.json or an agent's report, in bytes.
const maxFile = 4096

// A folder holds the files of one owner's bastion.
type folder struct {
	owner bastion.Owner
	path  string
}

// names matches users and profiles that can be part of a file name and of a command
// line. They have no "+", which separates the two.
var names = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}$`)

// folder returns owner's folder, which need not exist. Its path is absolute.
func (l *Launcher) folder(owner bastion.Owner) (folder, error) {
	if !names.MatchString(owner.User) || !names.MatchString(owner.Profile) {
		return folder{}, fmt.Errorf("%w: %q is not a name for a bastion", bastion.ErrNoAccount, owner)
	}
	dir, err := filepath.Abs(l.Dir)
	if err != nil {
		return folder{}, err
	}
	return folder{owner: owner, path: filepath.Join(dir, owner.String())}, nil
}

func (f folder) file(name string) string { return filepath.Join(f.path, name) }

func (f folder) idPrefix() string { return "local-" + f.owner.String() + "-" }

// newID returns a new task ID. Because of its random part, an ID is not reused even
// if the folder is deleted and generations start from one again.
func (f folder) newID(generation int64) string {
	var b [4]byte
	rand.Read(b[:])
	return fmt.Sprintf("%s%d-%s", f.idPrefix(), generation, hex.EncodeToString(b[:]))
}

// socket returns the path of the socket of a task's agent. It contains the end of the
// task's ID, so that a login for one task cannot reach its successor.
func (f folder) socket(id string) string {
	return f.file(strings.TrimPrefix(id, f.idPrefix()) + ".sock")
}

// removeSockets removes the sockets of agents that have ended. The caller holds
// agent.lock.
func (f folder) removeSockets() error {
	entries, err := os.ReadDir(f.path)
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".sock") {
			err = errors.Join(err, os.Remove(f.file(e.Name())))
		}
	}
	return err
}

// lock waits for launch.lock and returns a function that releases it.
func (f folder) lock(ctx context.Context) (unlock func(), err error) {
	file, err := os.OpenFile(f.file("launch.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := durable.Lock(ctx, file, syscall.LOCK_EX); err != nil {
		file.Close()
		return nil, err
	}
	return func() { file.Close() }, nil
}

// agentLives reports whether an agent, or a launcher that is about to start one,
// holds agent.lock.
func (f folder) agentLives() (bool, error) {
	file, err := os.Open(f.file("agent.lock"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	// A shared lock, so that two calls at the same time do not take each other
	// for an agent.
	err = durable.TryLock(file, syscall.LOCK_SH)
	if errors.Is(err, durable.ErrLocked) {
		return true, nil
	}
	return false, err
}

// takeAgentLock returns agent.lock, locked. The caller holds launch.lock and knows
// that no agent lives, so takeAgentLock waits only for calls of agentLives.
func (f folder) takeAgentLock(ctx context.Context) (*os.File, error) {
	file, err := os.OpenFile(f.file("agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := durable.Lock(ctx, file, syscall.LOCK_EX); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// A taskFile is the content of task.json: the owner's present or last task.
type taskFile struct {
	ID         string `json:"id"`
	Generation int64  `json:"generation"`
	report
}

// A report is written by an agent, as one line of JSON, when it listens. It is zero
// in the taskFile of a task whose agent has not reported.
type report struct {
	// Addr is the address of a Unix socket, see package unixsock.
	Addr    string `json:"addr,omitempty"`
	HostKey string `json:"host_key,omitempty"` // as in authorized_keys
}

// task returns the task of a complete taskFile.
func (r taskFile) task() bastion.Task {
	key, _ := r.hostKey() // checked when it was parsed
	return bastion.Task{ID: r.ID, Generation: r.Generation, Addr: r.Addr, HostKey: key, Usage: bastion.Usage{Platform: "local"}}
}

func (r report) hostKey() (ssh.PublicKey, error) {
	key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(r.HostKey))
	if err != nil {
		return nil, err
	}
	if len(rest) > 0 || key.Type() != ssh.KeyAlgoED25519 {
		return nil, fmt.Errorf("host key %q is not one ssh-ed25519 key", r.HostKey)
	}
	return key, nil
}

func (r report) check() error {
	if _, ok := unixsock.Path(r.Addr); !ok {
		return fmt.Errorf("address %q is not that of a Unix socket", r.Addr)
	}
	_, err := r.hostKey()
	return err
}

// parseReport parses an agent's report.
func parseReport(line []byte) (report, error) {
	var r report
	if err := json.Unmarshal(line, &r); err != nil {
		return report{}, fmt.Errorf("reading the agent's report: %w", err)
	}
	if err := r.check(); err != nil {
		return report{}, fmt.Errorf("reading the agent's report: %w", err)
	}
	return r, nil
}

// parseTaskFile parses a task.json.
func parseTaskFile(data []byte) (taskFile, error) {
	var r taskFile
	if err := json.Unmarshal(data, &r); err != nil {
		return taskFile{}, err
	}
	if r.ID == "" || r.Generation < 1 {
		return taskFile{}, errors.New("no id, or no generation")
	}
	if addr, err := netip.ParseAddrPort(r.Addr); err == nil && addr.Addr().IsLoopback() {
		r.report = report{} // of a version before Unix sockets, see the package comment
	}
	if r.report != (report{}) {
		if err := r.check(); err != nil {
			return taskFile{}, err
		}
	}
	return r, nil
}

// errGarbage says that a task.json was read and is invalid.
var errGarbage = errors.New("invalid task file")

// read returns the owner's present or last task; zero if there never was one. The
// error wraps errGarbage if the file is invalid.
func (f folder) read() (taskFile, error) {
	file, err := os.Open(f.file("task.json"))
	if errors.Is(err, os.ErrNotExist) {
		return taskFile{}, nil
	}
	if err != nil {
		return taskFile{}, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxFile))
	if err != nil {
		return taskFile{}, err
	}
	r, err := parseTaskFile(data)
	if err != nil {
		return taskFile{}, fmt.Errorf("%w: %s: %w", errGarbage, file.Name(), err)
	}
	return r, nil
}

// write replaces task.json. The caller holds launch.lock.
func (f folder) write(saved taskFile) error {
	data, err := json.Marshal(saved)
	if err != nil {
		return err
	}
	return durable.Replace(f.file("task.json"), append(data, '\n'))
}
