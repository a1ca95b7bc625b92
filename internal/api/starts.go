package api

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// failureLife is how long the failure of a start is shown.
const failureLife = 10 * time.Minute

// starts are the starts that requests wait for, and the last failures. The zero value is
// empty.
type starts struct {
	ctx     context.Context // ends the waits for bastions; set by Serve
	running sync.WaitGroup

	mu sync.Mutex
	of map[bastion.Owner]*start
}

// A start gets a bastion for the requests that wait for it, also after they have ended. If
// the bastion runs, it proves that, and takes milliseconds.
type start struct {
	done chan struct{} // closed when the fields below are set; never if the gateway drains first
	// failed is nil if the bastion runs.
	failed *gateway.Problem
	ended  time.Time
}

// begin returns the start of the owner's bastion that is under way, or begins one for the
// call. Limits are those of the owner.
func (s *starts) begin(owner bastion.Owner, dial func(context.Context, identity.Identity) error, limits identity.Limits, call *gateway.Call) *start {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(s.of, func(_ bastion.Owner, old *start) bool { return !old.ended.IsZero() && now.Sub(old.ended) > failureLife })
	if old := s.of[owner]; old != nil && old.ended.IsZero() {
		return old
	}
	if s.of == nil {
		s.of = map[bastion.Owner]*start{}
	}
	st := &start{done: make(chan struct{})}
	s.of[owner] = st
	s.running.Go(func() {
		// A login without permissions, like the one that ends a start.
		id := identity.Identity{User: owner.User, Profile: owner.Profile, ConnID: call.Ref(), Permissions: identity.Permissions{Limits: limits}}
		err := catchPanic(call, func() error { return dial(s.ctx, id) })
		if s.ctx.Err() != nil {
			return // the gateway drains, and the bastion goes on starting, as the requests answer
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		defer close(st.done)
		st.ended = time.Now()
		if err == nil {
			delete(s.of, owner)
			return
		}
		p := call.Explain(err)
		st.failed = &p
		// Names of profiles that do not exist must not fill the memory.
		if errors.Is(err, bastion.ErrNoProfile) {
			delete(s.of, owner)
			return
		}
		if p.Status >= 500 {
			call.Log().Error("no bastion for user", "user", owner.User, "profile", owner.Profile, "err", err)
		}
	})
	return st
}

// state reports whether the owner's bastion is starting for a request, and the last failure,
// if there was one.
func (s *starts) state(owner bastion.Owner) (starting bool, failed *gateway.Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.of[owner]
	switch {
	case st == nil:
		return false, nil
	case st.ended.IsZero():
		return true, nil
	case time.Since(st.ended) > failureLife:
		return false, nil
	}
	return false, st.failed
}

// catchPanic calls f. A panic in it is logged and returned as an error.
func catchPanic(call *gateway.Call, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			call.Crashed(p)
			err = errPanic
		}
	}()
	return f()
}
