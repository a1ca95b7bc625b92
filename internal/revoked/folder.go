package revoked

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/sallyport-ssh/sallyport/internal/durable"
)

// A Folder is a [Store] in the folder at this path, with a file for each user. It is made
// when it is first written to. Processes of one machine may share it, as a draining gateway
// and its successor do.
type Folder string

// maxFile limits the size of a file, in bytes. Entries have a few hundred.
const maxFile = 64 << 10

// newSuffix is the end of the name of a file that durable.Replace is writing.
const newSuffix = ".new"

// Revoked implements [Store].
func (f Folder) Revoked(context.Context) (map[string]string, error) {
	files, err := os.ReadDir(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	texts := make(map[string]string)
	for _, file := range files {
		name := file.Name()
		if !file.Type().IsRegular() || strings.HasPrefix(name, ".") || strings.HasSuffix(name, newSuffix) {
			continue
		}
		text, err := readFile(filepath.Join(string(f), name))
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
		case err != nil:
			return nil, err
		default:
			texts[name] = text
		}
	}
	return texts, nil
}

func readFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxFile))
	return string(text), err
}

// SetRevoked implements [Store]. The user's name must be one that users can have.
func (f Folder) SetRevoked(_ context.Context, user, text string) error {
	if user == "" || strings.HasPrefix(user, ".") || strings.HasSuffix(user, newSuffix) || strings.ContainsAny(user, "/\x00") {
		return fmt.Errorf("%q cannot be the name of a file", user)
	}
	path := filepath.Join(string(f), user)
	if text == "" {
		err := os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if err := os.MkdirAll(string(f), 0o700); err != nil {
		return err
	}
	return durable.Replace(path, []byte(text))
}
