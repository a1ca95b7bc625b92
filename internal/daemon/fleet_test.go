package daemon

import (
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/dynamo"
)

// TestAlone: a gateway is alone if no other has written a heartbeat of late.
func TestAlone(t *testing.T) {
	endpoint, stop, err := awsfake.StartDynalite()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	d := &Daemon{id: "this", table: dynamo.New(aws.Config{
		Region: "eu-central-1", Credentials: credentials.NewStaticCredentialsProvider("test", "test", ""), BaseEndpoint: &endpoint,
	}, "sallyport", "default")}
	if err := d.alone(t.Context()); err == nil {
		t.Error("alone without a table")
	}
	if err := d.table.Create(t.Context()); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for _, tt := range []struct {
		id    string
		seen  time.Time
		alone bool
	}{
		{"this", now, true},
		{"killed", now.Add(-maxSilence - time.Second), true},
		{"paused", now.Add(-maxSilence / 2), false},
	} {
		if err := d.table.Beat(t.Context(), dynamo.Gateway{ID: tt.id, Started: now, Seen: tt.seen}); err != nil {
			t.Fatal(err)
		}
		err := d.alone(t.Context())
		if (err == nil) != tt.alone || err != nil && !strings.Contains(err.Error(), tt.id) {
			t.Errorf("beside %s: %v", tt.id, err)
		}
	}
	if err := d.table.Leave(t.Context(), "paused"); err != nil {
		t.Fatal(err)
	}
	if err := d.alone(t.Context()); err != nil {
		t.Errorf("when the other gateway has ended: %v", err)
	}
}
