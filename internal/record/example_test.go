package record_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/sallyport-ssh/sallyport/internal/record"
)

// Record a session, and play the recording without pauses.
func Example() {
	dir, err := os.MkdirTemp("", "recordings")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)

	store := &record.Store{Dir: dir}
	session, err := store.Create(record.Header{User: "alice", Conn: "k3v9", Channel: 0, Width: 80, Height: 24})
	if err != nil {
		fmt.Println(err)
		return
	}
	session.Output([]byte("$ uptime\n"), false)
	session.Output([]byte("up 3 days\n"), false)
	if err := session.Close(); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("recorded in", filepath.Base(session.Path))

	reader, err := record.Open(session.Path)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer reader.Close()
	player := &record.Player{Speed: 1000}
	if err := player.Play(context.Background(), os.Stdout, reader); err != nil {
		fmt.Println(err)
	}
	// Output:
	// recorded in k3v9-0.cast
	// $ uptime
	// up 3 days
}
