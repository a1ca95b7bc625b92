package main

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// A collector receives traces by OTLP over HTTP.
type collector struct {
	server *httptest.Server

	mu       sync.Mutex
	spans    []*tracepb.Span
	problems []string
}

// startCollector starts a collector at 127.x.y.z:4318, the address of the script.
func (env *scriptEnv) startCollector(ts *testscript.TestScript, args []string) {
	c := &collector{}
	ln, err := net.Listen("tcp", net.JoinHostPort(env.loop, "4318"))
	ts.Check(err)
	c.server = httptest.NewUnstartedServer(c)
	c.server.Listener.Close()
	c.server.Listener = ln
	c.server.Start()
	ts.Defer(c.server.Close)
	env.collector = c
}

// ServeHTTP implements [http.Handler].
func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	var data tracepb.TracesData
	if err == nil {
		err = proto.Unmarshal(body, &data)
	}
	if err != nil || r.Method != "POST" || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" {
		c.problems = append(c.problems, fmt.Sprintf("%s %s %v: %v", r.Method, r.URL, r.Header, err))
		http.Error(w, "malformed", http.StatusBadRequest)
		return
	}
	for _, resource := range data.ResourceSpans {
		names := map[string]string{}
		for _, a := range resource.Resource.Attributes {
			names[a.Key] = a.Value.GetStringValue()
		}
		if names["service.name"] != "sallyport-gateway" || names["service.instance.id"] == "" {
			c.problems = append(c.problems, fmt.Sprintf("a resource with %v", names))
		}
		for _, scope := range resource.ScopeSpans {
			c.spans = append(c.spans, scope.Spans...)
		}
	}
}

// traces compares the traces that the collector has with those in files, and waits until
// they are the same. A line is a span, indented below its parent; spans with the same parent
// are sorted by name, and repetitions are left out. "!" marks an error. A span without a
// parent has its attributes, except for the connection, which must be in the operator's log.
func (env *scriptEnv) traces(ts *testscript.TestScript, args []string) {
	if len(args) == 0 || env.collector == nil {
		ts.Fatalf("usage: collector, and later traces FILE ...")
	}
	want := ""
	for _, file := range args {
		want += ts.ReadFile(file)
	}
	want = strings.TrimSpace(want)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		log, err := os.ReadFile(env.path("gateway.log"))
		ts.Check(err)
		got, problems := env.collector.render(string(log))
		if got == want && len(problems) == 0 {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v\ngot\n%s\nwant\n%s", problems, got, want)
		}
	}
}

// render returns the traces in the order of their beginnings.
func (c *collector) render(log string) (text string, problems []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	problems = slices.Clone(c.problems)
	known := map[string]*tracepb.Span{}
	children := map[string][]*tracepb.Span{}
	for _, s := range c.spans {
		known[string(s.SpanId)] = s
		children[string(s.ParentSpanId)] = append(children[string(s.ParentSpanId)], s)
	}
	for id, of := range children {
		parent := known[id]
		for _, s := range of {
			switch {
			case id == "":
			case parent == nil:
				problems = append(problems, fmt.Sprintf("%s has an unknown parent", s.Name))
			case string(parent.TraceId) != string(s.TraceId):
				problems = append(problems, fmt.Sprintf("%s and its parent %s are in two traces", s.Name, parent.Name))
			case s.StartTimeUnixNano < parent.StartTimeUnixNano:
				problems = append(problems, fmt.Sprintf("%s begins before its parent %s", s.Name, parent.Name))
			}
		}
	}
	var subtree func(s *tracepb.Span, indent string) string
	subtree = func(s *tracepb.Span, indent string) string {
		line := indent + s.Name
		if s.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR {
			line += " !"
		}
		if len(s.ParentSpanId) == 0 {
			attrs := map[string]string{}
			for _, a := range s.Attributes {
				attrs[a.Key] = a.Value.GetStringValue()
			}
			if conn := attrs["conn"]; conn == "" || !strings.Contains(log, `"conn":"`+conn+`"`) {
				problems = append(problems, fmt.Sprintf("the log does not have the connection %q", conn))
			}
			delete(attrs, "conn")
			if !strings.HasPrefix(attrs["client"], "127.") {
				problems = append(problems, fmt.Sprintf("the client %q", attrs["client"]))
			}
			delete(attrs, "client")
			for _, name := range slices.Sorted(maps.Keys(attrs)) {
				line += fmt.Sprintf(" %s=%s", name, attrs[name])
			}
		}
		var below []string
		for _, child := range children[string(s.SpanId)] {
			below = append(below, subtree(child, indent+"  "))
		}
		slices.Sort(below)
		return line + "\n" + strings.Join(slices.Compact(below), "")
	}
	roots := children[""]
	slices.SortFunc(roots, func(a, b *tracepb.Span) int { return int(int64(a.StartTimeUnixNano) - int64(b.StartTimeUnixNano)) })
	for _, s := range roots {
		text += subtree(s, "")
	}
	return strings.TrimSpace(text), problems
}
