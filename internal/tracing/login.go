package tracing

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// maxText limits the text of an error or an attribute, in bytes.
const maxText = 1 << 10

// Start begins a span, a child of the one in ctx, and returns a context with it and the
// function that ends it. Attrs are pairs of names and values. Without a trace in ctx, it does
// nothing.
func Start(ctx context.Context, name string, attrs ...string) (context.Context, func(error)) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return ctx, func(error) {}
	}
	// The tracer of the trace: there is no global one.
	tracer := parent.TracerProvider().Tracer("github.com/sallyport-ssh/sallyport")
	ctx, span := tracer.Start(ctx, name, trace.WithAttributes(pairs(attrs)...))
	return ctx, func(err error) { end(span, err) }
}

func pairs(attrs []string) (all []attribute.KeyValue) {
	for ; len(attrs) >= 2; attrs = attrs[2:] {
		all = append(all, attribute.String(attrs[0], clip(attrs[1])))
	}
	return all
}

// clip cuts long texts, and makes them valid for protobuf: otherwise a whole batch would fail.
func clip(text string) string { return strings.ToValidUTF8(text[:min(len(text), maxText)], "?") }

func end(span trace.Span, err error, options ...trace.SpanEndOption) {
	if err != nil {
		span.SetStatus(codes.Error, clip(err.Error()))
	}
	span.End(options...)
}

// A Login is the trace of one login. A nil Login does nothing.
//
// Phases before the user is proven are only noted, so that a client without a key costs
// nothing. [Login.Proven] makes spans of them.
type Login struct {
	tracer *Tracer
	conn   string
	client netip.AddrPort
	phases []phase

	mu        sync.Mutex
	root      trace.Span // nil before Proven
	connected time.Time  // to the bastion; zero before
	ended     bool
}

type phase struct {
	name  string
	began time.Time
}

// Login begins the trace of a connection, with its first phase. Conn is its reference in the
// logs.
func (t *Tracer) Login(began time.Time, first, conn string, client netip.AddrPort) *Login {
	if t == nil {
		return nil
	}
	return &Login{tracer: t, conn: conn, client: client, phases: []phase{{first, began}}}
}

// Phase begins the next phase, and ends the one before.
func (l *Login) Phase(name string) {
	if l != nil {
		l.phases = append(l.phases, phase{name, time.Now()})
	}
}

// Proven ends the last phase, and returns a context for [Start]. The client has proven to be
// the user.
func (l *Login) Proven(ctx context.Context, user, profile string) context.Context {
	if l == nil {
		return ctx
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.begin(ctx, nil, "user", user, "profile", profile)
}

// begin makes the spans so far. The last phase ends with err. The caller holds l.mu.
func (l *Login) begin(ctx context.Context, err error, proven ...string) context.Context {
	ctx, l.root = l.tracer.tracer.Start(ctx, "login", trace.WithNewRoot(), trace.WithTimestamp(l.phases[0].began), trace.WithSpanKind(trace.SpanKindServer),
		trace.WithAttributes(pairs(append(proven, "conn", l.conn, "client", l.client.String()))...))
	now := time.Now()
	for i, p := range l.phases {
		_, span := l.tracer.tracer.Start(ctx, p.name, trace.WithTimestamp(p.began))
		if i+1 < len(l.phases) {
			end(span, nil, trace.WithTimestamp(l.phases[i+1].began))
		} else {
			end(span, err, trace.WithTimestamp(now))
		}
	}
	l.phases = nil
	return ctx
}

// Refused ends the trace of a login that was refused because of err. Without a user that the
// client has proven, the trace counts against the limit, and does not have the text of err,
// which may have something from the client that is not for the collector.
func (l *Login) Refused(err error, proven bool) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	if !proven {
		if err = errUnproven; !l.tracer.refused.Allow() {
			return
		}
	}
	if l.root == nil {
		l.begin(context.Background(), err)
	}
	l.end(err)
}

var errUnproven = errors.New("no user was proven")

// Connected notes that the bastion is connected.
func (l *Login) Connected() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.connected = time.Now()
}

// FirstByte ends the trace: the bastion has sent the first byte for the client. It does not
// block.
func (l *Login) FirstByte() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || l.root == nil {
		return
	}
	_, span := l.tracer.tracer.Start(trace.ContextWithSpan(context.Background(), l.root), "first byte", trace.WithTimestamp(l.connected))
	span.End()
	l.end(nil)
}

// End ends the trace, if FirstByte has not: err is the reason why there is no bastion, nil if
// the client has left or the connection needs none. Without a first byte, the trace ends when
// the bastion was connected.
func (l *Login) End(err error) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.ended || l.root == nil:
	case err == nil && !l.connected.IsZero():
		l.end(nil, trace.WithTimestamp(l.connected))
	default:
		l.end(err)
	}
}

// end ends the trace. The caller holds l.mu.
func (l *Login) end(err error, options ...trace.SpanEndOption) {
	l.ended = true
	end(l.root, err, options...)
}
