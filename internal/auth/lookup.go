package auth

import (
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

// This file asks a command or a web server for a user's keys. Anybody can cause
// that by offering a key, so it is bounded:
//
//   - For one user one question is out at a time, and one more for keys that are
//     known to be hers: whoever has those does not wait behind strangers who offer
//     others in her name. Whoever asks meanwhile waits for the answer.
//   - An answer counts for LookupCache; one without keys, as strangers get, for
//     emptyFor at most. After a failure nothing is asked for retryAfter.
//   - Of all users together maxAsking questions are out, and of those for users
//     who are not known to have keys maxAskingStrangers. The rest wait, as long
//     as a question may take.
//   - Questions for users who are not known to have keys are refused when there
//     are more than sourceRate of them from one source, or more than totalRate.
//   - Answers are of maxAnswer bytes at most; maxCached of them are kept, those
//     with keys before those without.
const (
	lookupTimeout = 10 * time.Second
	lookupCache   = time.Minute
	lookupStale   = 10 * time.Minute

	emptyFor   = 10 * time.Second
	retryAfter = 5 * time.Second

	maxAsking          = 16
	maxAskingStrangers = 8

	// A rate is of a second, and as many as its burst may come at once.
	sourceRate, sourceBurst = 2, 20
	totalRate, totalBurst   = 50, 200
	maxSources              = 4096 // that are counted apart

	maxAnswer = 128 << 10

	complainEvery = 10 * time.Second // in the log, about failures
)

// A lookup asks for keys that are not in a file, and remembers the answers.
type lookup struct {
	setting string
	// perKey says that the answer depends on the key that is offered.
	perKey bool
	// needsFile says that it may be asked only for users who have a file.
	needsFile bool
	// fetch asks. It ends soon after ctx does. What it got the last time is
	// an answer without file if there is none, and may be returned again if
	// it still holds.
	fetch func(ctx context.Context, user string, key ssh.PublicKey, last answer) (answer, error)

	timeout, cache, stale time.Duration
	// outlive is how long a login that is going on outlives the last answer.
	outlive time.Duration
	log     *slog.Logger // may be nil

	total     chan struct{} // a place for each question that is out
	strangers chan struct{}
	pace      pace

	mu         sync.Mutex
	answers    map[question]*memory
	asking     map[turn]chan struct{} // closed when the answer is there
	complained time.Time
	unsaid     int // failures since that were not logged
}

// A question is what an answer is for.
type question struct {
	user string
	// key is the SHA-256 of the key, if that matters: a certificate may be as
	// long as its bearer likes.
	key [sha256.Size]byte
}

// A turn is what one question at a time can have.
type turn struct {
	user string
	// known says that it is for those that had keys for an answer before, or
	// for a login that is going on.
	known bool
}

// An answer is what a question brought. A user without keys has an empty file.
type answer struct {
	file *keyFile
	etag string // of the web server
	at   time.Time
	// problem is the first line that was passed over, and problems is how
	// many there are.
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

// memory is what is known about a question.
type memory struct {
	answer           // the last one; file may be nil
	failed time.Time // when asking failed after that; zero if it did not
	err    error     // how
}

// usable returns the answer that counts at the time now and until when, or why
// there is none. ok says that there is no need to ask. If after is not zero, an
// answer since then counts even if it is a little old, so that one that was asked
// for in the background is there to be found.
func (l *lookup) usable(m *memory, now, after time.Time) (file *keyFile, until time.Time, err error, ok bool) {
	if m == nil {
		return nil, time.Time{}, nil, false
	}
	fresh := l.cache
	if m.file != nil && len(m.file.entries) == 0 {
		fresh = min(fresh, emptyFor)
	}
	age := now.Sub(m.at)
	switch {
	case m.file != nil && !after.IsZero() && !m.at.Before(after) && age >= 0 && age < emptyFor && !m.failed.After(m.at):
		return m.file, m.at.Add(fresh), nil, true
	case m.file != nil && age >= 0 && age < fresh:
		return m.file, m.at.Add(fresh), nil, true
	case m.failed.IsZero() || now.Sub(m.failed) >= retryAfter || now.Before(m.failed):
		return nil, time.Time{}, nil, false
	case m.file != nil && age < l.stale && m.failed.After(m.at):
		return m.file, m.failed.Add(retryAfter), nil, true
	}
	return nil, time.Time{}, m.err, true
}

// givenUp says that no answer is to be expected any more for a login that is going
// on. sshd takes a command that fails for one that knows no keys, but for the user
// who is working a failure is more likely an outage than anybody's wish.
func (l *lookup) givenUp(m *memory, now, after time.Time) bool {
	if m == nil || m.failed.IsZero() {
		return false
	}
	last := after // the answer itself may have been forgotten
	if m.file != nil {
		last = m.at
	}
	return now.Sub(last) >= l.outlive
}

// ask returns the user's keys and until when that answer counts. If it does not
// wait and has no answer at hand, it asks nevertheless and returns ErrUndecided,
// unless there has been none for too long. For after see usable.
func (l *lookup) ask(user string, key ssh.PublicKey, from netip.Addr, wait bool, after time.Time) (*keyFile, time.Time, error) {
	q := question{user: user}
	if l.perKey {
		q.key = sha256.Sum256(key.Marshal())
	}
	timeout := time.NewTimer(2 * l.timeout) // somebody else's question, and ours
	defer timeout.Stop()
	for {
		now := time.Now()
		l.mu.Lock()
		m := l.answers[q]
		file, until, err, ok := l.usable(m, now, after)
		if (!ok || err != nil) && !wait && l.givenUp(m, now, after) {
			err = fmt.Errorf("%s: no answer for %v", l.setting, l.outlive)
		}
		if ok {
			l.mu.Unlock()
			return file, until, err
		}
		// A login that is going on is no stranger's.
		mine := turn{user, !wait || m != nil && m.file != nil && len(m.file.entries) > 0}
		done := l.asking[mine]
		if done == nil {
			if !mine.known && !l.pace.allow(from, now) {
				l.mu.Unlock()
				return nil, time.Time{}, undecided{fmt.Errorf("%s: too many questions for users without keys", l.setting)}
			}
			done = make(chan struct{})
			if l.asking == nil {
				l.asking = make(map[turn]chan struct{})
			}
			l.asking[mine] = done
			// It outlives an asker that does not wait, but not the timeout by
			// much: the answer serves the next one.
			go l.question(q, key, mine, done)
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

// question asks, remembers the answer and closes done.
func (l *lookup) question(q question, key ssh.PublicKey, mine turn, done chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), l.timeout)
	defer cancel()
	l.mu.Lock()
	var last answer
	if m := l.answers[q]; m != nil {
		last = m.answer
	}
	l.mu.Unlock()

	places := []chan struct{}{l.total}
	if !mine.known {
		places = []chan struct{}{l.strangers, l.total}
	}
	var got answer
	err := enter(ctx, places)
	if err == nil {
		got, err = l.fetch(ctx, q.user, key, last)
		for _, place := range places {
			<-place
		}
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	m := &memory{answer: last}
	switch {
	case err != nil:
		m.failed, m.err = now, undecided{fmt.Errorf("%s: %w", l.setting, err)}
		l.complain(now, "keys could not be looked up", slog.String("user", q.user), slog.Any("err", m.err),
			slog.Bool("last_answer_counts", m.file != nil && now.Sub(m.at) < l.stale))
	default:
		got.at = now
		m.answer = got
		if got.problem != nil {
			l.complain(now, "keys refused", slog.String("user", q.user), slog.String("source", l.setting),
				slog.Any("err", got.problem), slog.Int("lines", got.problems))
		}
	}
	l.keep(q, m)
	delete(l.asking, mine)
	close(done)
}

// enter takes a place in each, or none.
func enter(ctx context.Context, places []chan struct{}) error {
	for i, place := range places {
		select {
		case place <- struct{}{}:
		case <-ctx.Done():
			for _, place := range places[:i] {
				<-place
			}
			return errors.New("too many questions at once")
		}
	}
	return nil
}

// keep remembers. It is called with l.mu held.
func (l *lookup) keep(q question, m *memory) {
	if l.answers == nil {
		l.answers = make(map[question]*memory)
	}
	if _, ok := l.answers[q]; !ok && len(l.answers) >= maxCached {
		// Of some, in no order, the first without keys; if all have keys, one
		// of them. Then it is only asked for again.
		var victim question
		looked := 0
		for other, m := range l.answers {
			victim = other
			if looked++; looked == 32 || m.file == nil || len(m.file.entries) == 0 {
				break
			}
		}
		delete(l.answers, victim)
	}
	l.answers[q] = m
}

// complain logs, but not everything: strangers can cause it. It is called with
// l.mu held.
func (l *lookup) complain(now time.Time, msg string, attrs ...slog.Attr) {
	switch {
	case l.log == nil:
	case now.Sub(l.complained) < complainEvery:
		l.unsaid++
	default:
		l.log.LogAttrs(context.Background(), slog.LevelWarn, msg, append(attrs, slog.Int("not_logged_before", l.unsaid))...)
		l.complained, l.unsaid = now, 0
	}
}

// outside returns the lookups, in the order in which they are asked.
func (k *Keys) outside() []*lookup {
	k.once.Do(func() {
		add := func(l *lookup) {
			l.timeout, l.cache, l.outlive, l.log = k.LookupTimeout, k.LookupCache, k.LookupStale, k.Log
			if l.timeout == 0 {
				l.timeout = lookupTimeout
			}
			if l.cache == 0 {
				l.cache = lookupCache
			}
			if l.outlive == 0 {
				l.outlive = lookupStale
			}
			l.total = make(chan struct{}, maxAsking)
			l.strangers = make(chan struct{}, maxAskingStrangers)
			k.lookups = append(k.lookups, l)
		}
		if len(k.Command) > 0 {
			// No stale answers: scripts fail for users they do not know, and
			// one who is removed must not stay for ten minutes.
			add(&lookup{setting: sourceCommand, perKey: needsKey(k.Command), fetch: k.runCommand})
		}
		if k.URL != "" {
			add(&lookup{setting: sourceURL, needsFile: true, fetch: newFetcher(k.URL).fetch})
			l := k.lookups[len(k.lookups)-1]
			l.stale = l.outlive
		}
	})
	return k.lookups
}

// pace bounds how often something may happen, for one source and for all.
type pace struct {
	total   bucket
	sources map[netip.Prefix]*bucket
}

// allow counts one more at the time now, unless it is too many. It is not safe
// for concurrent use.
func (p *pace) allow(from netip.Addr, now time.Time) bool {
	bits := 32
	if from = from.Unmap(); from.Is6() {
		bits = 64 // what one customer gets
	}
	source, _ := from.Prefix(bits) // the zero one without an address
	b := p.sources[source]
	if b == nil {
		if len(p.sources) >= maxSources {
			p.forget(now)
		}
		if len(p.sources) >= maxSources {
			return false
		}
		if p.sources == nil {
			p.sources = make(map[netip.Prefix]*bucket)
		}
		b = &bucket{}
		p.sources[source] = b
	}
	// The source first: one that asks too often takes nothing from the others.
	return b.take(now, sourceRate, sourceBurst) && p.total.take(now, totalRate, totalBurst)
}

// forget drops the sources that are as good as new.
func (p *pace) forget(now time.Time) {
	for source, b := range p.sources {
		if now.Sub(b.at) >= sourceBurst/sourceRate*time.Second {
			delete(p.sources, source)
		}
	}
}

// A bucket loses what is taken from it, and fills with time.
type bucket struct {
	used float64
	at   time.Time
}

func (b *bucket) take(now time.Time, rate, burst float64) bool {
	if passed := now.Sub(b.at).Seconds(); passed > 0 {
		b.used = max(0, b.used-passed*rate)
		b.at = now
	}
	if b.used+1 > burst {
		return false
	}
	b.used++
	return true
}
