package bastion

import (
	"fmt"
	"maps"
	"time"
)

// A StartRate is how many bastions one user may have started, of all profiles
// together, within any time that long. Attempts that fail count; what is running
// or being started can be joined at any time. The zero value means no limit. A
// gateway counts its own starts only.
type StartRate struct {
	Starts int
	Per    time.Duration
}

// A TooOftenError says that a user's bastions have been started as often as they
// may be for now.
type TooOftenError struct {
	// Wait is until when they may be started again.
	Wait time.Duration
}

func (e *TooOftenError) Error() string {
	return fmt.Sprintf("the user's bastions were started too often; the next may be in %v", e.Wait.Round(time.Second))
}

// countStart counts a start among the user's, or returns a TooOftenError. The
// caller holds d.mu.
func (d *Dialer) countStart(user string) error {
	if d.StartsPerUser.Starts == 0 {
		return nil
	}
	now := time.Now()
	over := func(t time.Time) bool { return now.Sub(t) >= d.StartsPerUser.Per }
	// Starts are rare enough to look at everybody's.
	maps.DeleteFunc(d.starts, func(_ string, times []time.Time) bool { return over(times[len(times)-1]) })
	times := d.starts[user]
	for len(times) > 0 && over(times[0]) {
		times = times[1:]
	}
	if len(times) >= d.StartsPerUser.Starts {
		return &TooOftenError{Wait: times[0].Add(d.StartsPerUser.Per).Sub(now)}
	}
	if d.starts == nil {
		d.starts = make(map[string][]time.Time)
	}
	d.starts[user] = append(times, now)
	return nil
}
