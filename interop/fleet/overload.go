package main

import (
	"context"
	"io"
	"net/http"
	"time"
)

const (
	// probeInterval is the time between two probes of the services that the gateways
	// use, and slowProbe the duration from which on the machine counts as overloaded.
	// A gateway gives up an attempt of a call of the table after two seconds.
	probeInterval, slowProbe = time.Second, time.Second
)

// overloaded is not a fault of the fleet: other programs use the machine, so that the
// services of this run do not answer in time. The results have its duration.
var overloaded = &kind{"machine overloaded", true, true, 0, time.Minute}

// watchLoad probes the services, past their injected faults, until ctx ends. While one does
// not answer, no refused login or lost session is a broken promise.
func (f *fleet) watchLoad(ctx context.Context) {
	client := &http.Client{}
	for sleep(ctx, probeInterval) {
		began := time.Now()
		var fault *fault
		late := make(chan struct{})
		timer := time.AfterFunc(slowProbe, func() {
			fault = f.blame.begin(overloaded, 0, began)
			close(late)
		})
		for _, url := range f.probes {
			if resp, err := get(ctx, client, url); err == nil {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		}
		if !timer.Stop() {
			<-late
			f.blame.end(fault, time.Now())
			f.results.add(f.results.Counts, "seconds with an overloaded machine", int(time.Since(began).Seconds()))
		}
	}
}

func get(ctx context.Context, client *http.Client, url string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return client.Do(r)
}
