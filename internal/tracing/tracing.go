// Package tracing records where the time of a login goes, as traces of OpenTelemetry, and
// sends these to a collector (OTLP over HTTP, with protobuf).
//
// A trace is one login: a tree of spans, from the accepted connection to the first byte of
// its bastion. [Tracer.Login] begins it, and the context carries its current span to the
// packages below, which call [Start] for each phase. Without a trace in the context, Start
// does nothing.
//
// # Limits
//
// A trace must not cost a login anything. Spans wait in a queue, in memory; when it is full,
// more are dropped. A batch that the collector does not accept is dropped, too. Refused
// logins, which anyone can cause, are traced at a limited rate.
package tracing

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
)

const (
	// maxQueued is the number of spans that wait for the collector, and maxBatch that of
	// one request. A span has about 1 KiB.
	maxQueued, maxBatch = 2048, 256
	// batchTime is the longest time that a span waits for others.
	batchTime = 2 * time.Second
	// exportTimeout limits a request to the collector, and closeTimeout the last ones.
	exportTimeout, closeTimeout = 10 * time.Second, 5 * time.Second
	// alertInterval is how often a failure that persists is logged.
	alertInterval = time.Minute
	// refusedPerSecond and refusedBurst limit the traces of logins without a proven key.
	refusedPerSecond, refusedBurst = 1, 20
)

// Options are the settings. Package config reads them from the configuration file.
type Options struct {
	// Endpoint is the URL to which traces are sent. Empty means no tracing.
	Endpoint string
	// Sample is the part of the logins that are traced, above 0 and up to 1.
	Sample float64
}

// A Tracer begins the traces of logins. A nil Tracer begins none.
type Tracer struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	refused  *rate.Limiter
	closed   context.CancelFunc // ends all requests to the collector
}

// New returns a Tracer, or nil without an endpoint. It does not connect to the collector. Id
// is this gateway's among those of the deployment. The caller closes the Tracer.
func New(o Options, deployment, id string, log *slog.Logger) *Tracer {
	if o.Endpoint == "" {
		return nil
	}
	return newTracer(o, deployment, id, &http.Transport{Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute}, log)
}

func newTracer(o Options, deployment, id string, transport http.RoundTripper, log *slog.Logger) *Tracer {
	about := []attribute.KeyValue{attribute.String("service.name", "sallyport-gateway"), attribute.String("service.instance.id", id)}
	if deployment != "" {
		about = append(about, attribute.String("service.namespace", deployment))
	}
	ctx, closed := context.WithCancel(context.Background())
	collector := &collector{url: o.Endpoint, ctx: ctx, log: log, client: &http.Client{
		Timeout:       exportTimeout,
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	exporter, err := otlptrace.New(context.Background(), collector)
	if err != nil {
		panic(err) // collector.Start returns none
	}
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(o.Sample))),
		sdktrace.WithResource(resource.NewSchemaless(about...)),
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(maxQueued), sdktrace.WithMaxExportBatchSize(maxBatch),
			sdktrace.WithBatchTimeout(batchTime), sdktrace.WithExportTimeout(exportTimeout)),
	)
	return &Tracer{
		provider: provider, tracer: provider.Tracer("github.com/sallyport-ssh/sallyport"),
		refused: rate.NewLimiter(refusedPerSecond, refusedBurst),
		closed:  closed,
	}
}

// Close sends the spans that wait. It blocks for closeTimeout at most.
func (t *Tracer) Close() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	t.provider.Shutdown(ctx) // an error is logged by the collector
	t.closed()               // the SDK would go on in the background
}

// A collector implements [otlptrace.Client]. The one of OpenTelemetry, otlptracehttp, would
// add google.golang.org/grpc to the program.
type collector struct {
	url    string
	ctx    context.Context // of all requests
	client *http.Client
	log    *slog.Logger

	mu      sync.Mutex
	alerted time.Time // when a failure was last logged
}

func (c *collector) Start(context.Context) error { return nil }

func (c *collector) Stop(context.Context) error {
	c.client.CloseIdleConnections()
	return nil
}

// UploadTraces sends a batch. It returns no error, because the caller would hand it to a
// global function.
func (c *collector) UploadTraces(ctx context.Context, spans []*tracepb.ResourceSpans) error {
	err := c.send(ctx, spans)
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); err != nil && now.Sub(c.alerted) >= alertInterval {
		c.alerted = now
		c.log.Warn("traces cannot be sent to the collector, and are dropped", "err", err)
	}
	return nil
}

func (c *collector) send(ctx context.Context, spans []*tracepb.ResourceSpans) error {
	// On the wire, TracesData is the same as ExportTraceServiceRequest, whose package
	// imports grpc.
	body, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: spans})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	req.Header.Set("User-Agent", "sallyport-gateway")
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", c.url, cmp.Or(http.StatusText(resp.StatusCode), resp.Status))
	}
	return nil
}
