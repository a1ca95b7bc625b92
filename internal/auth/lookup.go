package auth

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// This file asks a command or a web server for a user's keys. Any client can cause
// such a query by offering a key, so they are limited:
//
//   - A user has at most two queries in flight: one for keys that she is known to
//     have, and one for all others. So clients that offer unknown keys in her name
//     do not delay her. Attempts with the same query share its answer.
//   - An answer is cached for LookupCache; an answer without keys for at most
//     emptyTTL. After a failure nothing is asked for retryAfter.
//   - All users together have at most maxInFlight queries in flight, of which
//     maxUnknownInFlight are for users without known keys. Other
//     queries wait, for at most the timeout of a query.
//   - Queries for users without known keys are rate-limited, per source
//     address and in total.
//   - An answer has at most maxAnswer bytes. At most maxCached answers are kept;
//     those without keys are evicted first.
const (
	lookupTimeout = 10 * time.Second
	lookupCache   = time.Minute
	lookupStale   = 10 * time.Minute

	emptyTTL   = 10 * time.Second
	retryAfter = 5 * time.Second

	maxInFlight        = 16
	maxUnknownInFlight = 8

	maxAnswer = 128 << 10

	failureLogInterval = 10 * time.Second
)

// A lookup asks for keys that are in no file, and caches the answers.
type lookup struct {
	setting string // its name, for grants and messages
	// perKey is set if the answer depends on the key that is offered.
	perKey bool
	// needsFile is set if only users with a file may be asked for.
	needsFile bool
	// fetch asks. It returns soon after ctx ends. last is the previous answer,
	// without a file if there is none; fetch may return it if it has not changed.
	fetch func(ctx context.Context, user string, key ssh.PublicKey, last answer) (answer, error)

	timeout  time.Duration
	ttl      time.Duration // of an answer
	staleTTL time.Duration // of an answer while queries fail; zero: it is not used then
	// loginGrace is for how long after the last answer a login survives failures.
	loginGrace time.Duration
	log        *slog.Logger // may be nil

	inFlight, unknownInFlight chan struct{} // semaphores
	limiter                   rateLimiter   // of queries for users without known keys

	mu         sync.Mutex
	entries    map[query]*cacheEntry
	pending    map[queryClass]chan struct{} // closed when the answer is cached
	lastLogged time.Time                    // failure
	suppressed int                          // failures since then
}

// A query identifies an answer.
type query struct {
	user string
	// key is the SHA-256 of the key if the answer depends on it. A hash, because a
	// certificate may have any length.
	key [sha256.Size]byte
}

// A queryClass has one query in flight at a time.
type queryClass struct {
	user string
	// known is set for keys that were in the previous answer, and for logins that
	// are already granted.
	known bool
}

// An answer is the result of a query. The file of a user without keys is empty.
type answer struct {
	file *keyFile
	etag string // of the web server
	at   time.Time
	// problem is the first line that was refused, problems the number of them.
	problem  error
	problems int
}

// newAnswer parses a user's keys; for refuse see parseKeys.
func newAnswer(user string, data []byte, refuse func(options) error) answer {
	file, problems, _ := parseKeys(user, data, refuse)
	a := answer{file: file, problems: len(problems)}
	if len(problems) > 0 {
		a.problem = problems[0]
	}
	return a
}

// hasKeys reports whether the answer has a key.
func (a *answer) hasKeys() bool { return a.file != nil && len(a.file.entries) > 0 }

// A cacheEntry is the last answer to a query, and the failure after it.
type cacheEntry struct {
	answer           // file is nil if there was none
	failed time.Time // zero if the answer is the last thing that happened
	err    error     // the failure
}

// usable returns the cached answer and until when it is valid, or the failure that
// stands for it. ok is false if the query must be sent.
//
// If since is not zero, an answer that arrived after it is valid for a little longer
// than its TTL: a login that has it asked for in the background must find it the
// next time.
func (l *lookup) usable(e *cacheEntry, now, since time.Time) (file *keyFile, until time.Time, err error, ok bool) {
	if e == nil {
		return nil, time.Time{}, nil, false
	}
	ttl := l.ttl
	if e.file != nil && !e.hasKeys() {
		ttl = min(ttl, emptyTTL)
	}
	age := now.Sub(e.at)
	switch {
	case e.file != nil && !since.IsZero() && !e.at.Before(since) && age >= 0 && age < emptyTTL && !e.failed.After(e.at):
		return e.file, e.at.Add(ttl), nil, true
	case e.file != nil && age >= 0 && age < ttl:
		return e.file, e.at.Add(ttl), nil, true
	case e.failed.IsZero() || now.Sub(e.failed) >= retryAfter || now.Before(e.failed):
		return nil, time.Time{}, nil, false
	case e.file != nil && age < l.staleTTL && e.failed.After(e.at):
		return e.file, e.failed.Add(retryAfter), nil, true
	}
	return nil, time.Time{}, e.err, true
}

// failedTooLong reports whether queries have failed for so long that a granted
// login must end. Until then a failure is rather an outage than a removed key,
// although sshd takes a command that fails for one that knows no keys.
func (l *lookup) failedTooLong(e *cacheEntry, now, since time.Time) bool {
	if e == nil || e.failed.IsZero() {
		return false
	}
	last := since // the answer itself may have been evicted
	if e.file != nil {
		last = e.at
	}
	return now.Sub(last) >= l.loginGrace
}

// ask returns the user's keys and until when they are valid. If wait is false and
// no answer is cached, ask sends the query in the background and returns
// ErrUndecided, or another error if queries have failed for too long. For since
// see usable.
func (l *lookup) ask(user string, key ssh.PublicKey, from netip.Addr, wait bool, since time.Time) (*keyFile, time.Time, error) {
	q := query{user: user}
	if l.perKey {
		q.key = sha256.Sum256(key.Marshal())
	}
	timeout := time.NewTimer(2 * l.timeout) // a query that is in flight, and ours
	defer timeout.Stop()
	for {
		now := time.Now()
		l.mu.Lock()
		e := l.entries[q]
		file, until, err, ok := l.usable(e, now, since)
		if (!ok || err != nil) && !wait && l.failedTooLong(e, now, since) {
			err = fmt.Errorf("%s: no answer for %v", l.setting, l.loginGrace)
		}
		if ok {
			l.mu.Unlock()
			return file, until, err
		}
		class := queryClass{user, !wait || e != nil && e.hasKeys()}
		done := l.pending[class]
		if done == nil {
			if !class.known && !l.limiter.allow(from, now) {
				l.mu.Unlock()
				return nil, time.Time{}, undecided{fmt.Errorf("%s: too many queries for users without keys", l.setting)}
			}
			done = make(chan struct{})
			if l.pending == nil {
				l.pending = make(map[queryClass]chan struct{})
			}
			l.pending[class] = done
			// The goroutine outlives a caller that does not wait, but not its
			// timeout by much. The answer is cached for the next caller.
			go l.send(q, key, class, done)
		}
		l.mu.Unlock()
		if !wait {
			if err == nil {
				err = undecided{fmt.Errorf("%s: being asked", l.setting)}
			}
			return nil, time.Time{}, err
		}
		select {
		case <-done:
		case <-timeout.C:
			return nil, time.Time{}, undecided{fmt.Errorf("%s: no answer in time", l.setting)}
		}
	}
}

// send sends a query, caches the answer and closes done.
func (l *lookup) send(q query, key ssh.PublicKey, class queryClass, done chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), l.timeout)
	defer cancel()
	l.mu.Lock()
	var last answer
	if e := l.entries[q]; e != nil {
		last = e.answer
	}
	l.mu.Unlock()

	semaphores := []chan struct{}{l.inFlight}
	if !class.known {
		semaphores = []chan struct{}{l.unknownInFlight, l.inFlight}
	}
	var got answer
	err := acquire(ctx, semaphores)
	if err == nil {
		got, err = l.fetch(ctx, q.user, key, last)
		for _, s := range semaphores {
			<-s
		}
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	e := &cacheEntry{answer: last}
	switch {
	case err != nil:
		e.failed, e.err = now, undecided{fmt.Errorf("%s: %w", l.setting, err)}
		l.logFailure(now, "keys could not be looked up", slog.String("user", q.user), slog.Any("err", e.err),
			slog.Bool("last_answer_counts", e.file != nil && now.Sub(e.at) < l.staleTTL))
	default:
		got.at = now
		e.answer = got
		if got.problem != nil {
			l.logFailure(now, "keys refused", slog.String("user", q.user), slog.String("source", l.setting),
				slog.Any("err", got.problem), slog.Int("lines", got.problems))
		}
	}
	l.store(q, e)
	delete(l.pending, class)
	close(done)
}

// acquire acquires all semaphores, or none.
func acquire(ctx context.Context, semaphores []chan struct{}) error {
	for i, s := range semaphores {
		select {
		case s <- struct{}{}:
		case <-ctx.Done():
			for _, s := range semaphores[:i] {
				<-s
			}
			return errors.New("too many queries at once")
		}
	}
	return nil
}

// store caches an entry. The caller holds l.mu.
func (l *lookup) store(q query, e *cacheEntry) {
	if l.entries == nil {
		l.entries = make(map[query]*cacheEntry)
	}
	if _, ok := l.entries[q]; !ok && len(l.entries) >= maxCached {
		// Of 32 random entries, evict the first without keys, or else the last.
		var victim query
		seen := 0
		for other, e := range l.entries {
			victim = other
			if seen++; seen == 32 || !e.hasKeys() {
				break
			}
		}
		delete(l.entries, victim)
	}
	l.entries[q] = e
}

// logFailure logs at most one record per failureLogInterval, because clients can
// cause failures. The caller holds l.mu.
func (l *lookup) logFailure(now time.Time, msg string, attrs ...slog.Attr) {
	switch {
	case l.log == nil:
	case now.Sub(l.lastLogged) < failureLogInterval:
		l.suppressed++
	default:
		l.log.LogAttrs(context.Background(), slog.LevelWarn, msg, append(attrs, slog.Int("not_logged_before", l.suppressed))...)
		l.lastLogged, l.suppressed = now, 0
	}
}

// externalSources returns the lookups, in the order in which they are asked.
func (k *Keys) externalSources() []*lookup {
	k.externalOnce.Do(func() {
		if len(k.Command) > 0 {
			// No stale answers: commands fail for users they do not know, and a
			// removed user must not stay for ten minutes.
			l := k.newLookup(sourceCommand, k.runCommand)
			l.perKey = needsKey(k.Command)
			k.external = append(k.external, l)
		}
		if k.URL != "" {
			l := k.newLookup(sourceURL, newFetcher(k.URL).fetch)
			l.needsFile, l.staleTTL = true, l.loginGrace
			k.external = append(k.external, l)
		}
	})
	return k.external
}

func (k *Keys) newLookup(setting string, fetch func(context.Context, string, ssh.PublicKey, answer) (answer, error)) *lookup {
	return &lookup{
		setting:         setting,
		fetch:           fetch,
		timeout:         cmp.Or(k.LookupTimeout, lookupTimeout),
		ttl:             cmp.Or(k.LookupCache, lookupCache),
		loginGrace:      cmp.Or(k.LookupStale, lookupStale),
		log:             k.Log,
		inFlight:        make(chan struct{}, maxInFlight),
		unknownInFlight: make(chan struct{}, maxUnknownInFlight),
	}
}
