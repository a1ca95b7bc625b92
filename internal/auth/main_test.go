package auth

import (
	"os"
	"testing"

	"github.com/sallyport-ssh/sallyport/internal/runas"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

func TestMain(m *testing.M) {
	runas.Init()
	sshtest.PrivateEtc()
	os.Exit(m.Run())
}
