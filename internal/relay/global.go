package relay

import (
	"github.com/sallyport-ssh/sallyport/internal/policy"
	"github.com/sallyport-ssh/sallyport/internal/sshmsg"
)

// requestsMax limits the unanswered global requests of a peer, and those on one channel.
// A peer that sends more is disconnected.
const requestsMax = 1024

// A globalRequest is one that wants a reply. Replies carry no number, so they are
// sent in the order of the requests (RFC 4254, section 4).
type globalRequest struct {
	from    *leg // nil if it is the gateway's own
	kind    string
	payload []byte // a copy, if there is a watcher
	kept    int    // bytes of kind and payload, see keep
	// settle, if not nil, is called with the reply.
	settle func(ok bool, reply []byte)

	done  bool // answered, by the far side or here
	ok    bool
	reply []byte
}

// globalRequest handles a request of from.
func (r *Relay) globalRequest(from *leg, packet []byte) error {
	m, err := sshmsg.ParseGlobalRequest(packet)
	if err != nil {
		return protocolError("malformed global request")
	}
	q := &globalRequest{from: from, kind: m.Type}
	if m.WantReply {
		if len(from.requests) >= requestsMax {
			return protocolError("too many unanswered requests")
		}
		if q.kept = len(m.Type) + len(m.Payload); !r.keep(q.kept) {
			return protocolError("too long unanswered requests")
		}
		from.requests = append(from.requests, q)
	}
	fromClient := from == &r.client
	why := error(nil)
	switch {
	case m.Type == sshmsg.Keepalive:
		if len(from.requests) > 1 {
			// The reply has to wait behind others. Send another packet at
			// once: OpenSSH takes any packet for a sign of life.
			from.conn.WritePacket(sshmsg.GlobalRequest{Type: sshmsg.Keepalive}.Append(nil))
		}
		q.done = true
	case m.Type == sshmsg.HostKeysProve && fromClient && r.ProveHostKeys != nil:
		q.done = true
		q.reply, q.ok = r.ProveHostKeys(m.Payload)
	case m.Type == sshmsg.HostKeys, m.Type == sshmsg.HostKeysProve:
		q.done = true
	case m.Type == sshmsg.NoMoreSessions && fromClient:
		r.noMoreSessions = true
		q.done, q.ok = true, true
	case r.refusal != "" || r.ending:
		q.done = true
	default:
		if why = policy.MayRequest(r.Permissions, m.Type, m.Payload); why != nil {
			r.refused(Refusal{Kind: m.Type, FromClient: fromClient, Payload: m.Payload, Channel: -1, Global: true, Code: sshmsg.Prohibited, Why: why.Error()})
			q.done = true
		} else if !r.hasRoom(from.far, len(packet)) {
			return protocolError("too many requests while the bastion is starting")
		}
	}
	if q.done {
		r.answerGlobal(from)
		return nil
	}
	if fromClient && !r.trackListener(q, m) {
		return nil
	}
	if m.WantReply {
		if r.Watch != nil {
			q.payload = append([]byte(nil), m.Payload...)
		}
	} else if r.Watch != nil && r.Watch.Granted(m.Type, fromClient, m.Payload, nil) != nil {
		return nil
	}
	if q.settle != nil && !m.WantReply && len(from.far.sent) < requestsMax {
		// OpenSSH wants no reply to a cancellation, but the relay must know when
		// the bastion has done it.
		q.from, m.WantReply = nil, true
		packet = m.Append(nil)
	}
	if m.WantReply {
		from.far.sent = append(from.far.sent, q)
	}
	r.write(from.far, packet)
	return nil
}

// trackListener adds a listener that the client asks for, or prepares to remove one that
// it cancels. If the request has too long a name, or exceeds the limit of listeners, it
// refuses the request and returns false.
func (r *Relay) trackListener(q *globalRequest, m sshmsg.GlobalRequest) bool {
	l, cancel, ok := parseListener(m.Type, m.Payload)
	switch {
	case !ok:
		return true
	case len(l.name) > nameMax:
		r.refuseListener(q, m, errLongName)
		return false
	case cancel:
		q.settle = func(ok bool, _ []byte) {
			if ok {
				r.listeners.cancelled(l)
			}
		}
		return true
	}
	settle, err := r.listeners.listen(l)
	if err != nil {
		r.refuseListener(q, m, err)
		return false
	}
	if m.WantReply {
		q.settle = settle
	} else {
		settle(true, nil)
	}
	return true
}

func (r *Relay) refuseListener(q *globalRequest, m sshmsg.GlobalRequest, why error) {
	r.refused(Refusal{Kind: m.Type, FromClient: true, Payload: m.Payload, Channel: -1, Global: true, Code: sshmsg.ResourceShortage, Why: why.Error()})
	q.done = true
	r.answerGlobal(&r.client)
}

// globalReply handles a reply of from.
func (r *Relay) globalReply(from *leg, packet []byte) error {
	if len(from.sent) == 0 {
		return nil // dropped, as OpenSSH does
	}
	q := from.sent[0]
	from.sent = from.sent[1:]
	q.done, q.ok = true, packet[0] == sshmsg.NumRequestSuccess
	if q.ok {
		q.reply = append([]byte(nil), packet[1:]...)
	}
	if q.settle != nil {
		q.settle(q.ok, q.reply)
	}
	if q.from == nil {
		return nil
	}
	if r.Watch != nil {
		fromClient := q.from == &r.client
		if !q.ok {
			r.refused(Refusal{Kind: q.kind, FromClient: fromClient, Payload: q.payload, Channel: -1, Global: true, Code: sshmsg.Prohibited, ByFar: true})
		} else if r.Watch.Granted(q.kind, fromClient, q.payload, q.reply) != nil {
			q.ok = false
		}
	}
	r.answerGlobal(q.from)
	return nil
}

// answerGlobal sends the replies that are due: those without an earlier request that is
// unanswered.
func (r *Relay) answerGlobal(to *leg) {
	for len(to.requests) > 0 && to.requests[0].done {
		q := to.requests[0]
		to.requests = to.requests[1:]
		r.kept -= q.kept
		if q.ok {
			to.conn.WritePacket(append([]byte{sshmsg.NumRequestSuccess}, q.reply...))
		} else {
			to.conn.WritePacket([]byte{sshmsg.NumRequestFailure})
		}
	}
	if len(to.requests) == 0 {
		to.requests = nil
	}
}

// Ask sends keepalive@openssh.com to the client, or to the bastion if there is
// one, and calls heard when the reply comes. Heard must not block.
func (r *Relay) Ask(client bool, heard func()) {
	r.mu.Lock()
	defer r.unlock()
	to := &r.bastion
	if client {
		to = &r.client
	}
	if to.conn == nil || len(to.sent) >= requestsMax {
		return
	}
	to.sent = append(to.sent, &globalRequest{kind: sshmsg.Keepalive, settle: func(bool, []byte) { heard() }})
	to.conn.WritePacket(sshmsg.GlobalRequest{Type: sshmsg.Keepalive, WantReply: true}.Append(nil))
	to.conn.Flush()
}
