package main

import (
	"bytes"
	"context"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// replies are the faults of a service's replies. The zero value has none.
type replies struct {
	// slow delays each call by up to this number of milliseconds.
	slow atomic.Int64
	// lossy is the percentage of calls that are lost: one half of them, at random,
	// before the service carries them out, and the other after that.
	lossy atomic.Int64
}

// next returns the faults of the next call.
func (r *replies) next() (delay time.Duration, lost, carriedOut bool) {
	if most := r.slow.Load(); most > 0 {
		delay = rand.N(time.Duration(most) * time.Millisecond)
	}
	return delay, rand.Int64N(100) < r.lossy.Load(), rand.IntN(2) == 0
}

// A table is a proxy of dynalite that counts calls, delays replies and loses them.
type table struct {
	proxy *httputil.ReverseProxy
	replies

	mu     sync.Mutex
	counts map[string]int // by operation; without heartbeats
}

func newTable(dynalite string) (*table, error) {
	to, err := url.Parse(dynalite)
	if err != nil {
		return nil, err
	}
	t := &table{proxy: httputil.NewSingleHostReverseProxy(to), counts: map[string]int{}}
	t.proxy.Transport = &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute}
	// A gateway that is killed leaves calls behind.
	t.proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	return t, nil
}

// ServeHTTP implements [http.Handler].
func (t *table) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	_, operation, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
	// Heartbeats, and the list of gateways, do not depend on logins.
	if !bytes.Contains(body, []byte(`"gateway/`)) {
		t.mu.Lock()
		t.counts[operation]++
		t.mu.Unlock()
	}
	delay, lost, carriedOut := t.next()
	if !sleep(r.Context(), delay) {
		return
	}
	// DynamoDB carries out a call whose client has gone. Dynalite crashes if it does not
	// get all of it.
	whole, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), patience)
	defer cancel()
	r = r.WithContext(whole)
	if lost {
		if carriedOut {
			t.proxy.ServeHTTP(httptest.NewRecorder(), r)
		}
		panic(http.ErrAbortHandler)
	}
	t.proxy.ServeHTTP(w, r)
}

// calls returns the number of calls of each operation so far.
func (t *table) calls() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.counts)
}

// serve serves a handler at an address of the network until close is called.
func serve(addr string, h http.Handler) (endpoint string, close func(), err error) {
	ln, err := net.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	go server.Serve(ln) // ends with close
	return "http://" + ln.Addr().String(), func() { server.Close() }, nil
}
