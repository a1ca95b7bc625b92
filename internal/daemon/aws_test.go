package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/secrets"
)

// memoryTexts are texts in memory, by reference. Those of a folder have a "/" more.
type memoryTexts struct {
	mu     sync.Mutex
	stored map[string]string
	plain  map[string]bool // references that are stored unencrypted
	failed error           // of every call, if not nil
}

func (m *memoryTexts) texts() texts {
	return texts{func(context.Context) (reader, error) { return m, nil }}
}

func (m *memoryTexts) set(reference, text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stored == nil {
		m.stored = map[string]string{}
	}
	m.stored[reference] = text
}

func (m *memoryTexts) remove(reference string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.stored, reference)
}

func (m *memoryTexts) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed = err
}

func (m *memoryTexts) Read(_ context.Context, reference string) (secrets.Secret, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	text, ok := m.stored[reference]
	if m.failed != nil || !ok {
		return secrets.Secret{}, errors.Join(m.failed, errors.New("does not exist"))
	}
	return secrets.Secret{Text: []byte(text), Encrypted: !m.plain[reference]}, nil
}

func (m *memoryTexts) Folder(_ context.Context, reference string) (map[string]secrets.Secret, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed != nil {
		return nil, m.failed
	}
	all := map[string]secrets.Secret{}
	for name, text := range m.stored {
		if below, ok := strings.CutPrefix(name, reference+"/"); ok {
			all[below] = secrets.Secret{Text: []byte(text), Encrypted: !m.plain[name]}
		}
	}
	return all, nil
}

// files returns the content of each file in dir.
func files(t *testing.T, dir string) map[string]string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", e.Name(), info.Mode(), err)
		}
		all[e.Name()] = string(text)
	}
	return all
}

func TestMakeCopies(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "aws")
	m := &memoryTexts{plain: map[string]bool{"ssm:/totp/bob": true}}
	users := config.Copy{Reference: "ssm:/users", Path: filepath.Join(dir, "users"), Folder: true}
	codes := config.Copy{Reference: "ssm:/totp", Path: filepath.Join(dir, "totp"), Folder: true, Private: true}
	ca := config.Copy{Reference: "ssm:ca", Path: filepath.Join(dir, "ca")}
	check := func(when string, wrong string, want map[string]string) {
		t.Helper()
		err := makeCopies(t.Context(), []config.Copy{users, codes, ca}, m.texts())
		if (err == nil) != (wrong == "") || err != nil && !strings.Contains(err.Error(), wrong) {
			t.Errorf("%s: %v", when, err)
		}
		if got := files(t, users.Path); !maps.Equal(got, want) {
			t.Errorf("%s: users are %q, want %q", when, got, want)
		}
	}
	m.set("ssm:ca", "ca key\n")
	m.set("ssm:/users/alice", "a")
	m.set("ssm:/users/bob", "b\n")
	m.set("ssm:/users/.hidden", "x")
	m.set("ssm:/totp/alice", "code")
	check("at first", "", map[string]string{"alice": "a\n", "bob": "b\n"})
	if got, err := os.ReadFile(ca.Path); string(got) != "ca key\n" || err != nil {
		t.Errorf("the file is %q, %v", got, err)
	}
	if info, err := os.Stat(users.Path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode of the folder: %v, %v", info.Mode(), err)
	}
	before, err := os.Stat(filepath.Join(users.Path, "bob"))
	if err != nil {
		t.Fatal(err)
	}

	m.set("ssm:/users/alice", "a2")
	m.set("ssm:/users/carol", "c")
	check("after a change", "", map[string]string{"alice": "a2\n", "bob": "b\n", "carol": "c\n"})
	if now, err := os.Stat(filepath.Join(users.Path, "bob")); err != nil || !os.SameFile(before, now) {
		t.Error("an unchanged file was replaced")
	}
	m.remove("ssm:/users/bob")
	check("after a removal", "", map[string]string{"alice": "a2\n", "carol": "c\n"})

	// A failure changes nothing, of no copy.
	m.remove("ssm:/users/carol")
	m.remove("ssm:ca")
	check("without the file", "ssm:ca: does not exist", map[string]string{"alice": "a2\n", "carol": "c\n"})
	m.set("ssm:ca", "ca key")
	m.set("ssm:/totp/bob", "plain")
	check("with a secret that is not encrypted", "ssm:/totp: bob is stored unencrypted; ", map[string]string{"alice": "a2\n", "carol": "c\n"})
	m.fail(errors.New("access is denied"))
	check("without access", "access is denied", map[string]string{"alice": "a2\n", "carol": "c\n"})
	if got := files(t, codes.Path); len(got) != 1 {
		t.Errorf("codes are %v", got)
	}
}

// TestRefresh: changes in AWS take effect within two minutes, and mistakes and
// failures change nothing and are logged once.
func TestRefresh(t *testing.T) {
	dir := t.TempDir()
	for _, key := range []string{"host", "fleet"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	m := &memoryTexts{}
	configure := func(extra string) {
		m.set("ssm:/gateway.yaml", strings.NewReplacer("DIR", dir, "ME", me.Username).Replace(`
host_keys: DIR/host
fleet_key: DIR/fleet
state_dir: DIR/state
authorized_keys_dir: ssm:/users
profiles: {default: {local: {account: ME, agent: /bin/true}}}
`)+extra)
	}
	configure("")
	m.set("ssm:/users/alice", "a")
	synctest.Test(t, func(t *testing.T) {
		cfg, err := config.Load("ssm:/gateway.yaml", m.texts().forConfig(t.Context(), ""))
		if err == nil {
			err = makeCopies(t.Context(), cfg.Copies, m.texts())
		}
		if err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		d, err := New(t.Context(), cfg, io.Discard, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		d.ConfigFile, d.texts = "ssm:/gateway.yaml", m.texts()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); d.followConfig(ctx) }()
		logged := func(text string, times int) {
			t.Helper()
			time.Sleep(5 * time.Minute)
			synctest.Wait()
			if n := strings.Count(log.String(), text); n != times {
				t.Errorf("%d records with %q, want %d:\n%s", n, text, times, log.String())
			}
		}
		users := func() int { return len(files(t, filepath.Join(dir, "state/aws/authorized_keys_dir"))) }

		logged("configuration reloaded", 0) // nothing has changed
		m.set("ssm:/users/bob", "b")
		configure("max_sessions: 7\n")
		logged("configuration reloaded", 1)
		if d.parts.cfg.MaxSessions != 7 || users() != 2 {
			t.Errorf("max_sessions is %d, and there are %d users", d.parts.cfg.MaxSessions, users())
		}
		configure("max_sessions: many\n")
		m.remove("ssm:/users/alice")
		logged("configuration not reloaded; the old one stays in force", 1)
		if d.parts.cfg.MaxSessions != 7 || users() != 1 {
			t.Errorf("after a mistake: max_sessions is %d, and there are %d users", d.parts.cfg.MaxSessions, users())
		}
		configure("max_sessions: 8\n")
		logged("configuration reloaded", 2)

		m.fail(errors.New("AWS does not answer"))
		logged("cannot read keys or lists from AWS; the last ones stay in force", 1)
		logged("configuration not reloaded; the old one stays in force", 2)
		if users() != 1 {
			t.Errorf("%d users without AWS", users())
		}
		m.fail(nil)
		logged("keys and lists in AWS can be read again", 1)

		// A draining gateway follows the keys only.
		d.drain()
		configure("max_sessions: 9\n")
		m.remove("ssm:/users/bob")
		logged("configuration reloaded", 2)
		if users() != 0 {
			t.Errorf("%d users of a draining gateway, after all were removed", users())
		}
		cancel()
		<-done
		d.Close()
	})
}
