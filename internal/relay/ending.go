package relay

import (
	"cmp"
	"slices"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// dismiss refuses the requests and channels that have waited for the bastion, whose start
// has failed.
func (r *Relay) dismiss(text string) {
	r.mu.Lock()
	defer r.unlock()
	if r.expected != "" {
		text = r.expected
	}
	r.refusal, r.bastion.backlog = text, nil
	for _, q := range r.client.requests {
		q.done = true
	}
	r.answerGlobal(&r.client)
	for _, c := range r.channels {
		switch {
		case c == nil:
		case c.early == nil:
			r.reject(c, sshmsg.ConnectFailed, text)
		case c.early.started: // else its client may not expect the end yet
			r.endSession(c, text, false)
		}
	}
	r.Client.Flush()
}

// bastionGone ends all channels, and writes to sessions that the bastion is lost.
func (r *Relay) bastionGone() {
	why := r.whyLost()
	r.mu.Lock()
	defer r.unlock()
	text := cmp.Or(r.expected, why)
	r.refuseOpens()
	for _, q := range r.client.requests {
		q.done = true
	}
	r.answerGlobal(&r.client)
	for _, c := range r.channels {
		switch {
		case c == nil:
		case c.state == opening && !c.fromClient:
			// The client's answer may still come.
			r.endChannel(c, true)
		case c.state == opening && c.early == nil:
			r.reject(c, sshmsg.ConnectFailed, "the other side is closing its connection")
		case c.err != nil: // only the bastion's CLOSE was awaited
			c.bastion.sentClose, c.bastion.toldClose = true, true
			r.freeIfClosed(c)
		case c.isSession():
			r.endSession(c, text, true)
		default:
			r.endChannel(c, true)
		}
	}
	r.Client.Flush()
}

// clientGone refuses new channels, and closes the bastion's connection.
func (r *Relay) clientGone() {
	r.mu.Lock()
	r.refuseOpens()
	up := r.bastion.conn
	r.unlock()
	if up != nil {
		up.Close()
	}
}

// finish frees the channels that are left, and tells the watcher. Both pumps have ended.
func (r *Relay) finish() {
	r.mu.Lock()
	defer r.unlock()
	for _, c := range r.channels {
		if c != nil {
			r.free(c)
		}
	}
}

// awaitFarewell waits until the client has closed its connection or all channels, or the
// time is over. Then it disconnects the client.
func (r *Relay) awaitFarewell(clientEnd <-chan struct{}, within time.Duration) {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-clientEnd:
		return
	case <-r.drained:
	case <-timer.C:
		r.endEarly()
	}
	r.Client.Disconnect(reasonByApplication, "")
}

// refuseOpens refuses new channels from now on.
func (r *Relay) refuseOpens() {
	r.ending = true
	if r.open == 0 {
		close(r.drained)
	}
}

// whyLost returns the text of Lost if a session is open that it can be written to.
func (r *Relay) whyLost() string {
	r.mu.Lock()
	tell := r.Lost != nil && r.expected == "" && slices.ContainsFunc(r.channels, func(c *channel) bool {
		return c != nil && c.isSession() && c.err == nil && !c.exited
	})
	r.unlock()
	if !tell {
		return ""
	}
	return r.Lost()
}

// fail ends a channel with the error of a watcher or a tap, and shows it to the user.
func (r *Relay) fail(c *channel, why error) { r.endSession(c, why.Error(), false) }

// endSession writes text to the session's standard error, and ends the channel with exit
// status 255; from now on no message passes. If lost is set, the bastion's connection has
// ended, and a session that has got its exit status gets no text.
func (r *Relay) endSession(c *channel, text string, lost bool) {
	if c.err != nil {
		return
	}
	c.err = errEnded
	if !(lost && c.exited) {
		if text != "" && c.isSession() {
			r.say(c, "\r\n"+text+"\r\n")
		}
		if c.isSession() {
			r.send(c, &r.client, sshmsg.Request{Type: sshmsg.RequestExitStatus, Payload: sshmsg.AppendExitStatus(nil, exitLost)}.Append(nil))
		}
	}
	if !c.client.toldEOF {
		r.send(c, &r.client, sshmsg.AppendRecipient(nil, sshmsg.NumEOF, 0))
	}
	r.endChannel(c, lost)
}

// exitLost is the exit status of a session that was ended; it is that of ssh(1)
// for errors of its own.
const exitLost = 255

// endChannel closes a channel on both sides.
func (r *Relay) endChannel(c *channel, lost bool) {
	c.err = errEnded
	r.stopProgress(c)
	r.endWatch(c, lost)
	if c.fromClient || c.state == opened {
		r.send(c, &r.client, sshmsg.AppendRecipient(nil, sshmsg.NumClose, 0))
	}
	switch {
	case lost || r.refusal != "" || c.early != nil && !c.early.openSent:
		c.bastion.sentClose, c.bastion.toldClose = true, true // its connection, or its channel, does not exist
	case c.state == opened:
		r.send(c, &r.bastion, sshmsg.AppendRecipient(nil, sshmsg.NumClose, 0))
	}
	r.freeIfClosed(c)
}
