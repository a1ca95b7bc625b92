package agent

import (
	"log"
	"os"
	"testing"

	"github.com/sallyport-ssh/sallyport/internal/runas"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// binaries is a directory for programs that tests build. Every account can read it.
var binaries string

func TestMain(m *testing.M) {
	runas.Init()
	sshtest.PrivateEtc()
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	var err error
	if binaries, err = os.MkdirTemp("/tmp", "agent-test-"); err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(binaries)
	if err := os.Chmod(binaries, 0o755); err != nil {
		log.Fatal(err)
	}
	return m.Run()
}
