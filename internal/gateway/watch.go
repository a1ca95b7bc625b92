package gateway

import (
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/relay"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// watcher returns the relay's watcher, or nil if nothing is audited or recorded.
func (c *conn) watcher() relay.Watcher {
	mode := c.identity.Permissions.Record
	if c.cfg.Record != nil {
		mode |= c.cfg.Record(c.identity)
	}
	if c.srv.Audit == nil && mode == identity.RecordNone {
		return nil
	}
	return &watcher{conn: c, mode: mode}
}

// A watcher implements [relay.Watcher]: it audits what the relay passes and refuses,
// and has sessions recorded.
type watcher struct {
	conn *conn
	mode identity.Record
}

// Open implements [relay.Watcher].
func (w *watcher) Open(o relay.Opening) (relay.ChannelWatcher, error) {
	c := w.conn
	ch := channelInfo{number: o.Number, began: time.Now()}
	if o.Kind == "session" {
		if err := c.audit(c.identity, audit.Event{Type: audit.Session, Channel: &o.Number}); err != nil {
			return nil, c.userError(err)
		}
		return &sessionWatcher{conn: c, mode: w.mode, channel: ch}, nil
	}
	e := channelEvent(o.Kind, o.Payload)
	e.Type, e.Channel = audit.Forward, &o.Number
	f := &forwardWatcher{conn: c, channel: ch, event: e.Clip()}
	if over, tight := c.overLogLimit(); tight && !over {
		if k := repeatKeyOf(f.event, false); c.audited.repeats.written(k, time.Now()) {
			f.repeat = &k
			return f, nil
		}
	}
	if err := c.audit(c.identity, e); err != nil {
		return nil, c.userError(err)
	}
	return f, nil
}

// Granted implements [relay.Watcher].
func (w *watcher) Granted(kind string, fromClient bool, payload, reply []byte) error {
	if !fromClient {
		return nil
	}
	e, known := listenerEvent(kind, payload, reply)
	if !known {
		return nil
	}
	return w.conn.audit(w.conn.identity, e)
}

// Refused implements [relay.Watcher].
func (w *watcher) Refused(r relay.Refusal) { w.conn.auditRelayRefusal(r) }

// auditRelayRefusal writes that a channel, channel request or global request was
// refused.
func (c *conn) auditRelayRefusal(r relay.Refusal) {
	var e audit.Event
	switch {
	case r.Channel >= 0:
		if !auditsRefusal(r.Kind) {
			return
		}
		e = requestEvent(r.Kind, r.Payload)
		e.Channel = &r.Channel
	case r.Global:
		var known bool
		if e, known = listenerEvent(r.Kind, r.Payload, nil); !known {
			return
		}
	default:
		e = channelEvent(r.Kind, r.Payload)
	}
	e.Type, e.By = audit.Refused, "gateway"
	if r.ByFar {
		e.By = "bastion"
		if !r.FromClient {
			e.By = "client"
		}
	}
	// A policy's refusal names its rule, a failure its reason.
	if r.ByFar && r.Code != sshmsg.Prohibited {
		e.Reason = r.Why
	} else {
		e.Rule = r.Why
	}
	c.auditRefused(c.identity, e)
}

// channelInfo is common to both kinds of channel watchers.
type channelInfo struct {
	number int
	began  time.Time
}

// channelEnd completes the event of a channel's end, and adds the bytes to those of
// the connection. Lost says that the bastion's connection ended first.
func (c *conn) channelEnd(ch channelInfo, e audit.Event, toBastion, toClient int64, lost bool) audit.Event {
	c.audited.fromClient.Add(toBastion)
	c.audited.toClient.Add(toClient)
	e.Channel = &ch.number
	e.Totals = &audit.Totals{FromClient: toBastion, ToClient: toClient, Seconds: secondsSince(ch.began)}
	if lost {
		e.By, e.Reason = "bastion", "the bastion has gone"
		if cause := c.audited.cause.Load(); cause != nil { // the gateway closed it
			e.By, e.Reason = cause.by, cause.reason
		}
	}
	return e
}

// A forwardWatcher watches a channel that is not a session.
type forwardWatcher struct {
	conn    *conn
	channel channelInfo
	event   audit.Event // of the channel's beginning
	repeat  *repeatKey  // not nil if that event was not written
}

func (w *forwardWatcher) Taps() *relay.Taps                   { return nil }
func (w *forwardWatcher) Request(string, bool, []byte) error  { return nil }
func (w *forwardWatcher) Answered(string, bool, []byte, bool) {}

func (w *forwardWatcher) End(toBastion, toClient int64, lost bool) {
	c, e := w.conn, w.event
	e.Type = audit.ForwardEnd
	e = c.channelEnd(w.channel, e, toBastion, toClient, lost)
	if w.repeat != nil {
		c.audited.repeats.addTotals(*w.repeat, e, time.Now())
		return
	}
	c.audit(c.identity, e)
}
