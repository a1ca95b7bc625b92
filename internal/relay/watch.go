package relay

import (
	"time"

	"golang.org/x/crypto/ssh"
)

// A Watcher is told what a connection does, before it happens where that can be
// prevented, so that it can be written down. Methods are called from several
// goroutines at once, and what they belong to waits until they return. Payloads
// are as they came from the peer, and may be read only until the call returns.
type Watcher interface {
	// Open is told of a channel that the far side has confirmed. Nothing has
	// passed on it yet. The result, if not nil, is told what does. An error
	// refuses the channel; its text is for the user.
	Open(Opening) (ChannelWatcher, error)
	// Granted is told of a global request that the far side has granted, or
	// that wants no answer. Reply is the payload of the answer. An error
	// tells the asker that it was refused.
	Granted(kind string, fromClient bool, payload, reply []byte) error
	// Refused is told of a channel or a request that has been refused.
	Refused(Refusal)
}

// An Opening is a channel that begins.
type Opening struct {
	Number     int // of this channel on the connection: 0, 1, 2 ...
	Kind       string
	FromClient bool
	Payload    []byte
}

// A Refusal is a channel or a request that did not pass.
type Refusal struct {
	// Kind is the type of the channel or request.
	Kind       string
	FromClient bool
	Payload    []byte
	// Channel is the number of the channel that the request belongs to, -1 if
	// it is a global one or the opening of a channel.
	Channel int
	Global  bool // it is a global request
	// ByFar says that it was the far side that refused, and not the relay.
	ByFar bool
	// Code and Why are those of the refusal of a channel.
	Code ssh.RejectionReason
	Why  string
}

// A ChannelWatcher is told what passes on one channel.
type ChannelWatcher interface {
	// Request is told of a request before it is passed on. From then on all
	// data goes through the taps it returns, if any. An error ends the
	// channel; its text is shown to the user.
	Request(kind string, fromClient bool, payload []byte) (*Taps, error)
	// Answered is told what became of a request that wanted an answer, before
	// the answer is passed on.
	Answered(kind string, fromClient bool, payload []byte, ok bool)
	// End is told that the channel has ended, and how many bytes of data went
	// each way; lost says that it ended because the bastion's connection did.
	// It is the last call.
	End(toBastion, toClient int64, lost bool)
}

// Taps are the ways to look at the data of a channel; either may be nil.
type Taps struct{ ToClient, ToBastion Tap }

// A Tap sees data before it is passed on, and may keep it no longer than the
// call. It may be called by two goroutines at once, one of which has stderr. An
// error ends the channel; its text is shown to the user.
type Tap func(p []byte, stderr bool) error

func (r *Relay) refused(what Refusal) {
	if r.Watch != nil {
		r.Watch.Refused(what)
	}
}

// reject refuses a channel for a reason of our own.
func (s *side) reject(nc ssh.NewChannel, reason ssh.RejectionReason, why string) {
	s.r.refused(Refusal{Kind: nc.ChannelType(), FromClient: s.toServer, Payload: nc.ExtraData(), Channel: -1, Code: reason, Why: why})
	nc.Reject(reason, why)
}

// watchOpen tells the watcher, if there is one, of a channel.
func (s *side) watchOpen(nc ssh.NewChannel, number int) (ChannelWatcher, error) {
	if s.r.Watch == nil {
		return nil, nil
	}
	return s.r.Watch.Open(Opening{Number: number, Kind: nc.ChannelType(), FromClient: s.toServer, Payload: nc.ExtraData()})
}

// tapped is what a sink's data goes through.
type tapped struct {
	see  Tap
	fail func(error) // ends the channel
}

// through shows p to the tap, if there is one.
func (s *sink) through(p []byte, stderr bool) error {
	t := s.tap.Load()
	if t == nil {
		return nil
	}
	err := t.see(p, stderr)
	if err != nil {
		t.fail(err)
	}
	return err
}

// install puts taps on both directions of a channel; f is one of them.
func (f *flow) install(taps *Taps) {
	client, bastion := f.reverse.to, f.to
	if !f.toServer {
		client, bastion = bastion, client
	}
	if taps.ToClient != nil {
		client.tap.Store(&tapped{taps.ToClient, f.end})
	}
	if taps.ToBastion != nil {
		bastion.tap.Store(&tapped{taps.ToBastion, f.end})
	}
}

// end lets nothing pass any more, shows the user why the channel cannot go on,
// and closes it. The client may not be reading.
func (f *flow) end(why error) {
	client := f.to
	if f.toServer {
		client = f.reverse.to
	}
	nothing := &tapped{func([]byte, bool) error { return why }, func(error) {}}
	f.to.tap.Store(nothing)
	f.reverse.to.tap.Store(nothing)
	told := make(chan struct{})
	f.start(&f.r.wg, func() { // ends with the channel at the latest
		defer close(told)
		client.say([]byte("\r\n" + why.Error() + "\r\n"))
		client.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{255}))
	})
	select {
	case <-told:
	case <-time.After(farewell):
	}
	client.Close()
	f.from.Close()
	f.to.Close()
}
