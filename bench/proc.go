package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// clockTick is USER_HZ, the unit of times in /proc/PID/stat: 100 on every Linux
// port that both Go and Debian support.
const clockTick = 100

// stat reads /proc/PID/stat (proc_pid_stat(5)); its field 4 is element 1.
func stat(pid int) ([]string, error) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// Field 2 is a name that may contain spaces and parentheses.
	_, rest, ok := strings.Cut(string(line[strings.LastIndexByte(string(line), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 15 {
		return nil, fmt.Errorf("/proc/%d/stat: unexpected %q", pid, line)
	}
	return fields, nil
}

// cpuSeconds returns the CPU time of a process without its children.
func cpuSeconds(pid int) (float64, error) {
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	return ticks(fields[11:13]), nil
}

// treeCPUSeconds returns the CPU time of a process and all its descendants,
// including those that have ended.
func treeCPUSeconds(pid int) (float64, error) {
	var sum float64
	for _, p := range append(descendants(pid), pid) {
		fields, err := stat(p)
		if err != nil {
			if p == pid {
				return 0, err
			}
			continue // it has just ended, and its parent has its time
		}
		sum += ticks(fields[11:15]) // utime, stime, and of reaped children
	}
	return sum, nil
}

func ticks(fields []string) float64 {
	var sum float64
	for _, f := range fields {
		n, _ := strconv.ParseFloat(f, 64)
		sum += n
	}
	return sum / clockTick
}

// descendants returns the children of pid and their descendants, in no order.
func descendants(pid int) []int {
	children := map[int][]int{}
	dirs, _ := os.ReadDir("/proc")
	for _, d := range dirs {
		p, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if fields, err := stat(p); err == nil {
			parent, _ := strconv.Atoi(fields[1])
			children[parent] = append(children[parent], p)
		}
	}
	var found []int
	for queue := []int{pid}; len(queue) > 0; {
		next := children[queue[0]]
		queue = append(queue[1:], next...)
		found = append(found, next...)
	}
	return found
}

// privateKiB returns the memory that the end of the process would free.
func privateKiB(pid int) (float64, error) {
	name := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var sum float64
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) == 3 && (fields[0] == "Private_Clean:" || fields[0] == "Private_Dirty:") {
			n, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", name, err)
			}
			sum += n
		}
	}
	return sum, lines.Err()
}
