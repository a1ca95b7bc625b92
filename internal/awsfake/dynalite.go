package awsfake

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// dynalite is the npm package of an implementation of DynamoDB, and its version.
const dynalite = "dynalite@4.0.0"

// StartDynalite starts a DynamoDB of its own on this machine, which keeps its
// tables in memory, and returns its URL. It needs node, and at its first use npm,
// which installs dynalite into the user's cache folder. The caller calls stop.
func StartDynalite() (endpoint string, stop func(), err error) {
	program, err := InstallDynalite()
	if err != nil {
		return "", nil, err
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	addr := free.Addr().String()
	free.Close()
	_, port, _ := net.SplitHostPort(addr)
	server := exec.Command("node", program, "--host", "127.0.0.1", "--port", port, "--createTableMs", "0")
	if err := server.Start(); err != nil {
		return "", nil, fmt.Errorf("starting %s (Debian package nodejs): %w", dynalite, err)
	}
	stop = func() { server.Process.Kill(); server.Wait() }
	for range 600 {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return "http://" + addr, stop, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	stop()
	return "", nil, fmt.Errorf("%s does not listen", dynalite)
}

// InstallDynalite returns the path of the program, for node, and installs it if it is
// missing. It installs into a folder of its own, which becomes the final one when it
// is complete: two test programs may install at once.
func InstallDynalite() (program string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "sallyport-test", dynalite)
	program = filepath.Join(dir, "node_modules", "dynalite", "cli.js")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "install")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	install := exec.Command("npm", "install", "--silent", "--no-audit", "--no-fund", "--no-save", "--prefix", tmp, dynalite)
	if out, err := install.CombinedOutput(); err != nil {
		return "", fmt.Errorf("installing %s (Debian packages nodejs and npm): %w\n%s", dynalite, err, out)
	}
	if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return program, nil
}
