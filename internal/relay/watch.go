package relay

// A Watcher logs channels and requests, and may forbid those that have not happened yet.
// Its methods are called one at a time, and the whole connection waits until they return.
// Of the Relay's methods they may call Tell and Expect only. Payloads are the peer's, and
// valid until the call returns.
type Watcher interface {
	// Open is called for a channel that the far side has confirmed, or that is an
	// early session, before any message passes on it. The result may be nil. An
	// error refuses the channel; the user sees its text.
	Open(Opening) (ChannelWatcher, error)
	// Granted is called for a global request that the far side has granted, or
	// that wants no reply. Reply is the payload of the reply. If it returns an
	// error, the reply is failure.
	Granted(kind string, fromClient bool, payload, reply []byte) error
	// Refused is called for a channel or a request that has been refused.
	Refused(Refusal)
}

// An Opening describes a new channel.
type Opening struct {
	Number     int // serial number on the connection: 0, 1, 2 ...
	Kind       string
	FromClient bool
	Payload    []byte
}

// A Refusal describes a channel or a request that was refused.
type Refusal struct {
	// Kind is the type of the channel or request.
	Kind       string
	FromClient bool
	Payload    []byte
	// Channel is the number of the channel that the request belongs to, -1 if
	// it is a global one or the opening of a channel.
	Channel int
	Global  bool // it is a global request
	// ByFar says that the far side has refused it, and not the relay.
	ByFar bool
	// Code and Why are the reason code and the text (RFC 4254, section 5.1).
	Code uint32
	Why  string
}

// A ChannelWatcher logs the messages of one channel.
type ChannelWatcher interface {
	// Taps is called once, before any message passes. All data goes through the
	// taps that it returns; nil means none. Data that a client sends behind a
	// request may come to a tap before Request is called.
	Taps() *Taps
	// Request is called for a request before it passes. An error ends the
	// channel; the user sees its text.
	Request(kind string, fromClient bool, payload []byte) error
	// Answered is called with the reply to a request, before the reply passes.
	Answered(kind string, fromClient bool, payload []byte, ok bool)
	// End is the last call, when the channel has ended, with the bytes of data in
	// each direction. Lost says that it ended because the bastion's connection
	// did.
	End(toBastion, toClient int64, lost bool)
}

// Taps are the taps of a channel's data; either may be nil.
type Taps struct{ ToClient, ToBastion Tap }

// A Tap is called with data before it passes, and must not keep it. An error ends the
// channel; the user sees its text.
type Tap func(p []byte, stderr bool) error

func (r *Relay) refused(what Refusal) {
	if r.Watch != nil {
		r.Watch.Refused(what)
	}
}
