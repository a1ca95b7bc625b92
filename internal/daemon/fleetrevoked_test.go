package daemon

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/sallyport-ssh/sallyport/internal/dynamo"
	"github.com/sallyport-ssh/sallyport/internal/revoked"
)

// A remoteStore is a store that another gateway writes to, and that may be unreachable.
type remoteStore struct {
	mu    sync.Mutex
	texts map[string]string
	err   error
}

func (s *remoteStore) Revoked(context.Context) (map[string]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.texts, s.err
}

func (s *remoteStore) SetRevoked(context.Context, string, string) error {
	return errors.New("not here")
}

func (s *remoteStore) set(texts map[string]string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.texts, s.err = texts, err
}

// TestRefreshRevoked: a revocation at another gateway that did not reach this one is known
// after an interval, and holds while the store is unreachable.
func TestRefreshRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, log := &remoteStore{}, &lockedBuffer{}
		d := &Daemon{log: slog.New(slog.NewTextHandler(log, nil))}
		d.revoked = &revoked.List{Store: store, Log: d.log}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { d.refreshRevoked(ctx) })
		store.set(map[string]string{"alice": `{"by":"root"}`}, nil)
		if err := d.revoked.Check("alice", time.Now()); err != nil {
			t.Error(err)
		}
		time.Sleep(folderInterval + time.Second)
		if err := d.revoked.Check("alice", time.Now()); err == nil {
			t.Error("alice is not revoked after an interval")
		}
		store.set(nil, errors.New("unreachable"))
		time.Sleep(time.Hour)
		if err := d.revoked.Check("alice", time.Now()); err == nil {
			t.Error("alice is not revoked while the store is unreachable")
		}
		if !strings.Contains(log.String(), "the last copy stays in force") {
			t.Error(log.String())
		}
		store.set(nil, nil)
		time.Sleep(folderInterval + time.Second)
		if err := d.revoked.Check("alice", time.Now()); err != nil {
			t.Errorf("after a permit: %v", err)
		}
		cancel()
		wg.Wait()
	})
}

// TestReadRevokedFirst: a gateway does not start without the revoked users in the table.
func TestReadRevokedFirst(t *testing.T) {
	log := &lockedBuffer{}
	nobody := "http://127.0.0.1:1"
	d := &Daemon{log: slog.New(slog.NewTextHandler(log, nil)), table: dynamo.New(aws.Config{
		Region: "eu-central-1", Credentials: credentials.NewStaticCredentialsProvider("test", "test", ""), BaseEndpoint: &nobody,
	}, "sallyport", "default")}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := d.readRevoked(ctx, t.TempDir()); err == nil || !strings.Contains(err.Error(), "users that are revoked could log in") {
		t.Errorf("got %v", err)
	}

	// Without a table, they are in state_dir, which need not exist yet.
	d.table = nil
	state := filepath.Join(t.TempDir(), "state")
	if err := d.readRevoked(t.Context(), state); err != nil {
		t.Fatal(err)
	}
	if err := d.revoked.Revoke(t.Context(), revoked.Entry{User: "alice", By: "root"}); err != nil {
		t.Fatal(err)
	}
	again := &Daemon{log: d.log}
	if err := again.readRevoked(t.Context(), state); err != nil || again.revoked.Check("alice", time.Now()) == nil {
		t.Errorf("after a restart: %v", err)
	}
}
