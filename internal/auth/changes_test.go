package auth

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// settle makes the cached file look as if it had been read long after its last
// change, as it is in real life; the tests have no time to wait.
func settle(t *testing.T, k *Keys, user string) {
	t.Helper()
	if _, err := k.file(user); err != nil {
		t.Fatal(err)
	}
	k.keys.mu.Lock()
	defer k.keys.mu.Unlock()
	k.keys.files[user].readAt = time.Now().Add(2 * settleTime)
}

func TestChanges(t *testing.T) {
	t.Parallel()
	one, two := edKey(1), edKey(2)
	dir := keysDir(t, "alice", authorized(one))
	path := filepath.Join(dir, "alice")
	k := &Keys{Dir: dir}
	may := func(want ...bool) {
		t.Helper()
		for i, key := range []ssh.PublicKey{one, two} {
			if _, err := k.Authorize("alice", key, home, today); (err == nil) != want[i] {
				t.Errorf("key %d: %v", i+1, err)
			}
		}
	}
	may(true, false)

	t.Run("same length, inode and times, right after the read", func(t *testing.T) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(authorized(two)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
			t.Fatal(err)
		}
		may(false, true)
	})
	t.Run("renamed over a settled file", func(t *testing.T) {
		settle(t, k, "alice")
		cached, err := k.file("alice")
		if err != nil {
			t.Fatal(err)
		}
		if again, err := k.file("alice"); err != nil || again != cached {
			t.Errorf("a settled file was read again (%v)", err)
		}
		replace(t, path, authorized(one))
		may(true, false)
	})
	t.Run("locked away after it was cached", func(t *testing.T) {
		settle(t, k, "alice")
		may(true, false)
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		may(false, false)
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		may(true, false)
	})
	t.Run("removed", func(t *testing.T) {
		settle(t, k, "alice")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		may(false, false)
		if len(k.keys.files) != 0 {
			t.Errorf("%d users are remembered", len(k.keys.files))
		}
	})
	t.Run("folder removed", func(t *testing.T) {
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Authorize("alice", one, home, today); err == nil || !strings.Contains(err.Error(), "opening the authorized keys") {
			t.Errorf("error %v", err)
		}
	})
}

// TestLogsOncePerChange counts the records of the log.
func TestLogsOncePerChange(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	dir := keysDir(t, "alice", lines(`environment="TOKEN-X=secret" `+authorized(edKey(1)), authorized(edKey(2))))
	k := &Keys{Dir: dir, Log: slog.New(slog.NewJSONHandler(&out, nil))}
	logged := func() []string {
		t.Helper()
		for range 3 {
			k.Authorize("alice", edKey(2), home, today)
		}
		var texts []string
		for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
			if line == "" {
				continue
			}
			var rec struct{ Msg, User, Err string }
			if err := json.Unmarshal([]byte(line), &rec); err != nil {
				t.Fatal(err)
			}
			texts = append(texts, rec.User+": "+strings.ReplaceAll(rec.Err, dir+"/", ""))
		}
		out.Reset()
		return texts
	}
	steps := []struct {
		do   func() error
		want []string
	}{
		{func() error { return nil }, []string{`alice: alice:1: option "environment": a variable's name is made of letters, digits and underscores`}},
		{func() error { return nil }, nil},
		{func() error { replace(t, filepath.Join(dir, "alice"), authorized(edKey(2))); return nil }, nil},
		{func() error { replace(t, filepath.Join(dir, "alice"), "pty"); return nil }, []string{"alice: alice:1: no key after the options"}},
		{func() error { return os.Chmod(filepath.Join(dir, "alice"), 0o666) }, []string{"alice: alice: mode 0666 lets others write to it; logins that depend on it are refused until chmod go-w"}},
		{func() error { return os.Chmod(dir, 0o775) }, []string{": " + dir + ": mode 0775 lets others write to it; logins that depend on it are refused until chmod go-w"}},
		{func() error { return os.Chmod(dir, 0o755) }, nil},
		{func() error { return os.Chmod(dir, 0o775) }, []string{": " + dir + ": mode 0775 lets others write to it; logins that depend on it are refused until chmod go-w"}},
	}
	for i, s := range steps {
		if err := s.do(); err != nil {
			t.Fatal(err)
		}
		if got := logged(); !slices.Equal(got, s.want) {
			t.Errorf("step %d: logged %q, want %q", i, got, s.want)
		}
	}

	// A file full of mistakes does not flood the log.
	replace(t, filepath.Join(dir, "alice"), strings.Repeat("shiny\n", 5000))
	os.Chmod(dir, 0o755)
	if got := logged(); len(got) != 21 {
		t.Errorf("%d records for a file of mistakes", len(got))
	}
}

// TestRewriteDuringLogins changes a file in both ways during concurrent logins. If the
// file is replaced by rename, the key in both versions must always be granted. In
// either way, a restriction must never be lost, and a key of a refused line never be
// granted.
func TestRewriteDuringLogins(t *testing.T) {
	t.Parallel()
	stays, comes, never := edKey(1), edKey(2), edKey(3)
	restricted := `restrict,command="only this" ` + authorized(stays)
	filler := strings.Repeat(authorized(edKey(9))+" filler\n", 60) // more than one page
	versions := []string{
		filler + restricted + "\n" + authorized(comes) + "\n",
		restricted + " a longer comment\n" + filler + "shiny " + authorized(never) + "\n",
	}
	for name, write := range map[string]func(path, text string) error{
		"rename": func(path, text string) error {
			if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
				return err
			}
			return os.Rename(path+".new", path)
		},
		"in place": func(path, text string) error { return os.WriteFile(path, []byte(text), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := keysDir(t, "alice", versions[0])
			k := &Keys{Dir: dir, Log: slog.New(slog.DiscardHandler)}
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for range 15 {
						g, err := k.Authorize("alice", stays, home, today)
						if err != nil && name == "rename" {
							t.Error(err)
						}
						if err == nil && (g.ForceCommand != "only this" || g.PTY) {
							t.Errorf("a restriction was lost: %+v", g)
						}
						if _, err := k.Authorize("alice", never, home, today); err == nil {
							t.Error("a refused line was granted")
						}
					}
				})
			}
			done := make(chan struct{})
			var writer sync.WaitGroup
			writer.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-done:
						return
					default:
					}
					if err := write(filepath.Join(dir, "alice"), versions[i%2]); err != nil {
						t.Error(err)
						return
					}
				}
			})
			wg.Wait()
			close(done)
			writer.Wait()
		})
	}
}
