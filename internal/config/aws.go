package config

import (
	"fmt"
	"path/filepath"
	"strings"
)

// AWS reads the texts in AWS that a file refers to, as "ssm:" or "secretsmanager:"
// and a name or ARN.
type AWS struct {
	// Secret returns the text of a reference. encrypted reports whether it is stored
	// encrypted. Its errors do not repeat the reference, and contain no secret.
	Secret func(reference string) (text []byte, encrypted bool, err error)
	// Copies is the folder of all copies; see [Copy]. Empty means the folder "aws"
	// in the state_dir.
	Copies string
}

// A Copy is a file or folder of this machine with the content of a text, or of
// parameters, in AWS. The setting that refers to these has the path of the copy. The
// caller of Load makes the copies, and keeps them up to date.
type Copy struct {
	Reference string // such as ssm:/sallyport/users
	Path      string
	// Folder means a folder with a file for each parameter directly below the
	// reference, a path of Systems Manager. Otherwise the copy is a file.
	Folder bool
	// Private means that the content must be stored encrypted.
	Private bool

	place string
}

// Mistake returns err with the file, the line and the setting of the reference.
func (c Copy) Mistake(err error) error { return fmt.Errorf("%s: %s: %w", c.place, c.Reference, err) }

// CopyAt returns the copy at path, if there is one.
func (g *Gateway) CopyAt(path string) (Copy, bool) {
	for _, c := range g.Copies {
		if c.Path == path {
			return c, true
		}
	}
	return Copy{}, false
}

// IsReference reports whether s refers to a text in AWS, and is not the path of a
// file.
func IsReference(s string) bool {
	return strings.HasPrefix(s, "ssm:") || strings.HasPrefix(s, "secretsmanager:")
}

// copies collects the copies of a file.
type copies struct {
	dir string // of all
	all []Copy
}

// copiesDir returns the folder of all copies. v is the whole file.
func (v value) copiesDir() string {
	if v.aws != nil && v.aws.Copies != "" {
		return v.aws.Copies
	}
	state := Defaults().StateDir
	quiet := v
	quiet.report = &report{} // state_dir is read again, with its mistakes
	quiet.entries(func(name string, v value) {
		if name == "state_dir" {
			state = v.path()
		}
	})
	return filepath.Join(state, "aws")
}

// copyOf returns the path of the copy of a reference, and false if v is none.
func (v value) copyOf(folder, private bool) (path string, ok bool) {
	reference := resolve(v.node).Value
	if !IsReference(reference) {
		return "", false
	}
	switch {
	case v.aws == nil:
		v.mistake("%s: texts in AWS cannot be used here; name a file", reference)
	case folder && !strings.HasPrefix(reference, "ssm:/"):
		v.mistake("%s: is not a path of parameters; write ssm:/NAME, as in ssm:/sallyport/users", reference)
	}
	name := v.name
	for n := 2; ; n++ { // a list has several
		path = filepath.Join(v.copies.dir, name)
		taken := false
		for _, c := range v.copies.all {
			taken = taken || c.Path == path
		}
		if !taken {
			break
		}
		name = fmt.Sprintf("%s.%d", v.name, n)
	}
	v.copies.all = append(v.copies.all, Copy{Reference: reference, Path: path, Folder: folder, Private: private, place: v.place()})
	return path, true
}
