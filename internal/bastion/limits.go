package bastion

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// A StartRate limits how many bastions of one user, of all profiles together, are
// started within Per. Failed starts count; joining a start, or connecting to a
// running bastion, does not. The zero value means no limit.
type StartRate struct {
	Starts int
	Per    time.Duration
}

// A TooOftenError says that a user has reached the StartRate.
type TooOftenError struct {
	// Wait is the time until the next start is permitted.
	Wait time.Duration
}

func (e *TooOftenError) Error() string {
	return fmt.Sprintf("the user's bastions were started too often; the next may be in %v", e.Wait.Round(time.Second))
}

// A TextStore holds a short text for each user and name. It is shared by gateways
// that start bastions of the same users.
type TextStore interface {
	// Update replaces the text by the result of change, which is given the
	// present one, empty if there is none, and may be called more than once. An
	// error of change is returned, and the text stays.
	Update(ctx context.Context, user, name string, change func(old string) (string, error)) error
}

// recentStarts is the TextStore of one process for the times of starts. The zero
// value is empty.
type recentStarts struct {
	mu     sync.Mutex
	byUser map[string]string
}

func (r *recentStarts) Update(_ context.Context, user, _ string, change func(string) (string, error)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next, err := change(r.byUser[user])
	if err != nil {
		return err
	}
	if r.byUser == nil {
		r.byUser = make(map[string]string)
	}
	r.byUser[user] = next
	return nil
}

// forget removes the users whose last start was before the given time.
func (r *recentStarts) forget(before time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.byUser, func(_, text string) bool {
		times, err := parseStarts(text)
		return err != nil || len(times) == 0 || times[len(times)-1].Before(before)
	})
}

// countStart counts a start of the user's, or returns a TooOftenError.
func (d *Dialer) countStart(ctx context.Context, user string) error {
	rate := d.settings().StartsPerUser
	if rate.Starts == 0 {
		return nil
	}
	now := time.Now()
	var starts TextStore = &d.recent
	if d.Starts != nil {
		starts = d.Starts
	} else {
		d.recent.forget(now.Add(-rate.Per)) // starts are rare enough to look at all users
	}
	repeated := false
	err := patiently(ctx, func(ctx context.Context) (again bool, err error) {
		again = true // the error is not of the following function
		err = starts.Update(ctx, user, "starts", func(old string) (string, error) {
			next, err := addStart(old, now, rate, repeated)
			again = err == nil
			return next, err
		})
		repeated = true
		return again, err
	}, func(err error) { d.Log.Warn("cannot count a start; trying again", "user", user, "err", err) })
	if err != nil {
		return fmt.Errorf("counting the starts of %s: %w", user, err)
	}
	return nil
}

// addStart adds a start to the text of a TextStore, or returns a TooOftenError. If it is
// repeated, the text may have the start already, because a reply was lost.
func addStart(text string, now time.Time, rate StartRate, repeated bool) (string, error) {
	times, err := parseStarts(text)
	if err != nil {
		return "", err
	}
	// A start in the future is one of a gateway whose clock is ahead.
	times = slices.DeleteFunc(times, func(t time.Time) bool { return now.Sub(t).Abs() >= rate.Per })
	if repeated && slices.ContainsFunc(times, now.Equal) {
		return text, nil
	}
	if len(times) >= rate.Starts {
		return "", &TooOftenError{Wait: times[0].Add(rate.Per).Sub(now)}
	}
	next, err := json.Marshal(append(times, now))
	return string(next), err
}

// parseStarts parses the text of a TextStore: times in JSON, the oldest first.
func parseStarts(text string) (times []time.Time, err error) {
	if text == "" {
		return nil, nil
	}
	if err := json.Unmarshal([]byte(text), &times); err != nil {
		return nil, fmt.Errorf("the times of starts: %w", err)
	}
	return times, nil
}

// durationSamples is the number of a profile's latest starts that UsualStart uses.
const durationSamples = 9

// startDurations holds the durations of the latest starts. The zero value is ready
// for use.
type startDurations struct {
	mu        sync.Mutex
	byProfile map[string][]time.Duration // the oldest first
}

func (s *startDurations) add(profile string, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byProfile == nil {
		s.byProfile = make(map[string][]time.Duration)
	}
	all := append(s.byProfile[profile], took)
	s.byProfile[profile] = slices.Clone(all[max(0, len(all)-durationSamples):])
}

// UsualStart returns how long bastions of a profile usually take to start: the
// median of the latest nine successful starts of this Dialer. It is zero before the
// first one.
func (d *Dialer) UsualStart(profile string) time.Duration {
	d.durations.mu.Lock()
	defer d.durations.mu.Unlock()
	all := slices.Sorted(slices.Values(d.durations.byProfile[profile]))
	if len(all) == 0 {
		return 0
	}
	return all[len(all)/2]
}
