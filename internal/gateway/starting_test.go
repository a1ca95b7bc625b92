package gateway

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// TestStillStarting: a terminal shows the usual start time of the profile, if it is known.
func TestStillStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // for its clock
		usual := map[string]time.Duration{"default": 35 * time.Second}
		for profile, want := range map[string]string{
			"default": "Your bastion is still starting, 40 s; usually 35 s ",
			"other":   "Your bastion is still starting, 40 s ",
		} {
			c := &conn{
				srv:      &Server{UsualStart: func(profile string) time.Duration { return usual[profile] }},
				identity: identity.Identity{Profile: profile},
				dial:     &dial{began: time.Now().Add(-40 * time.Second)},
			}
			if got := c.stillStarting(); got != want {
				t.Errorf("%s: %q, want %q", profile, got, want)
			}
		}
		c := &conn{srv: &Server{}, dial: &dial{began: time.Now()}}
		if got, want := c.stillStarting(), "Your bastion is still starting, 1 s "; got != want {
			t.Errorf("at once: %q, want %q", got, want)
		}
	})
}
