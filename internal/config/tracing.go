package config

import (
	"net/url"
	"strconv"

	"github.com/sallyport-ssh/sallyport/internal/tracing"
)

// Tracing are the settings of traces.
type Tracing struct {
	tracing.Options
	// PlainHTTP permits a collector of another machine without TLS.
	PlainHTTP bool
}

// tracesPath is the path of a collector for traces (OTLP specification, "OTLP/HTTP Request").
const tracesPath = "/v1/traces"

// tracing reads the value of the key tracing.
func (v value) tracing(t *Tracing) {
	t.Sample = 1
	var collector *url.URL
	seen := v.mapping(map[string]func(value){
		"endpoint":   func(v value) { collector = v.collector() },
		"sample":     func(v value) { t.Sample = v.fraction() },
		"plain_http": func(v value) { t.PlainHTTP = v.boolean() },
	})
	switch {
	case !seen["endpoint"]:
		v.mistake("names no collector; write endpoint: http://127.0.0.1:4318, or leave tracing out")
	case collector == nil:
	case collector.Scheme == "http" && !t.PlainHTTP && !isLoopback(collector.Hostname()):
		v.mistake("sends the names of users to another machine without TLS; write https://, or permit it with plain_http: true")
	default:
		t.Endpoint = collector.String()
	}
}

// collector reads the URL of a collector, and returns nil after a mistake.
func (v value) collector() *url.URL {
	text, ok := v.text()
	if !ok {
		return nil
	}
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Hostname() == "" || u.Scheme != "https" && u.Scheme != "http" || u.RawQuery != "" || u.Fragment != "":
		v.mistake("%q is not a URL like http://127.0.0.1:4318", text)
		return nil
	case u.User != nil:
		v.mistake("may not have a password; collectors with one need a collector of yours between")
		return nil
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = tracesPath
	}
	return u
}

// fraction reads a number above 0 and up to 1.
func (v value) fraction() float64 {
	s, ok := v.text()
	if !ok {
		return 1
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || !(f > 0 && f <= 1) { // NaN is neither
		v.mistake("%q is not a number above 0 and up to 1, such as 0.1", s)
		return 1
	}
	return f
}
