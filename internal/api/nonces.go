package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

const (
	// nonceLife is how long a nonce is remembered. A request that is maxSkew ahead of
	// the gateway's clock is accepted for that long.
	nonceLife = 2 * maxSkew
	// maxNonces limits the remembered nonces of a user, and with it her requests in
	// nonceLife.
	maxNonces = 240
)

// nonces remembers the nonces of accepted requests, so that none is accepted twice. They are
// remembered for proven users only, so strangers cannot fill the memory.
type nonces struct {
	// store is shared by the gateways that have the same users.
	store bastion.TextStore
	// began is the time from which on all nonces are known. A single gateway has
	// forgotten those from before its start.
	began time.Time
}

// use remembers a nonce that was signed at the time at. The error is [gateway.ErrReplayed] if
// it was used before, and a [gateway.RateError] if the user has too many.
func (n *nonces) use(ctx context.Context, user, nonce string, at, now time.Time) error {
	if at.Before(n.began.Truncate(time.Second)) {
		return fmt.Errorf("%w: before the start of this gateway", gateway.ErrClock)
	}
	sum := sha256.Sum256([]byte(nonce))
	id := hex.EncodeToString(sum[:8])
	var refusal error
	err := n.store.Update(ctx, user, "nonces", func(old string) (string, error) {
		refusal = nil
		var kept []string
		oldest := now
		for _, entry := range strings.Fields(old) {
			used, hash, _ := strings.Cut(entry, ":")
			seconds, err := strconv.ParseInt(used, 10, 64)
			if err != nil {
				return "", fmt.Errorf("the used nonces: %w", err)
			}
			since := time.Unix(seconds, 0)
			if now.Sub(since) > nonceLife {
				continue
			}
			if hash == id {
				refusal = gateway.ErrReplayed
				return old, nil
			}
			if since.Before(oldest) {
				oldest = since
			}
			kept = append(kept, entry)
		}
		if len(kept) >= maxNonces {
			refusal = &gateway.RateError{Wait: max(time.Second, oldest.Add(nonceLife).Sub(now))}
			return old, nil
		}
		return strings.Join(append(kept, fmt.Sprintf("%d:%s", now.Unix(), id)), " "), nil
	})
	if err != nil {
		return fmt.Errorf("whether the request is new is %w: %w", auth.ErrUndecided, err)
	}
	return refusal
}

// maxIdleUsers is the number of users from which on a nonceMemory looks for users whose
// nonces are forgotten.
const maxIdleUsers = 1024

// A nonceMemory is the [bastion.TextStore] of a single gateway. The zero value is empty.
type nonceMemory struct {
	mu    sync.Mutex
	texts map[string]string
	used  map[string]time.Time
}

// Update implements [bastion.TextStore].
func (m *nonceMemory) Update(_ context.Context, user, _ string, change func(string) (string, error)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next, err := change(m.texts[user])
	if err != nil {
		return err
	}
	if m.texts == nil {
		m.texts, m.used = map[string]string{}, map[string]time.Time{}
	}
	now := time.Now()
	if m.used[user].IsZero() && len(m.used) >= maxIdleUsers {
		maps.DeleteFunc(m.used, func(_ string, at time.Time) bool { return now.Sub(at) > nonceLife })
		maps.DeleteFunc(m.texts, func(user, _ string) bool { return m.used[user].IsZero() })
	}
	m.texts[user], m.used[user] = next, now
	return nil
}
