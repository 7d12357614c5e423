//! How much memory can still be had on the host: the least of what the machine, the control groups and the limits of the
//! process leave.
//!
//! ```text
//! machine         MemAvailable
//! control group   limit - (used - cache that the kernel gives back), of the own group and of every group above it
//! ulimit -v, -d   limit - address space, limit - data
//! ```

use std::fs::read_to_string;
use std::path::{Component, Path, PathBuf};

/// Bytes that can still be had; `None` where the system does not say (Linux does).
pub fn available() -> Option<f64> {
    let root = Path::new("/");
    [Some(machine(root)?), in_groups(root), of_the_process()].into_iter().flatten().min_by(f64::total_cmp)
}

/// The value of `key` in lines of `key: value kB`, in bytes.
fn kib(text: &str, key: &str) -> Option<f64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
}

fn machine(root: &Path) -> Option<f64> {
    kib(&read_to_string(root.join("proc/meminfo")).ok()?, "MemAvailable")
}

/// The two interfaces of control groups, as they name the same things.
struct Version {
    /// Of the mount.
    kind: &'static str,
    limits: &'static [&'static str],
    used: &'static str,
    /// Lines of `memory.stat`: cache of files, and of names, that is given back before anything is killed. What lies in a tmpfs
    /// is not among them.
    cache: &'static [&'static str],
    /// A limit of `memory.stat` that counts groups above the mount too.
    above: &'static str,
}

const VERSIONS: [Version; 2] = [
    Version {
        kind: "cgroup2",
        // above `high` nothing is killed, but everything that allocates is made to wait
        limits: &["memory.max", "memory.high"],
        used: "memory.current",
        cache: &["inactive_file", "active_file", "slab_reclaimable"],
        above: "",
    },
    Version {
        kind: "cgroup",
        limits: &["memory.limit_in_bytes"],
        used: "memory.usage_in_bytes",
        cache: &["total_inactive_file", "total_active_file"],
        above: "hierarchical_memory_limit",
    },
];

/// The least that the own group and those above it leave, of both versions; `None` without a limit.
fn in_groups(root: &Path) -> Option<f64> {
    let groups = read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut folders: Vec<(&Version, PathBuf)> = Vec::new();
    for version in &VERSIONS {
        let Some(group) = own_group(&groups, version) else { continue };
        for (mount, shown) in mounts.lines().filter_map(|line| mount(line, version)) {
            // a container may see its own group as the whole tree, or a name that only the host knows
            let below = group.strip_prefix(&shown).unwrap_or(&group);
            let below: PathBuf = below.components().filter(|part| matches!(part, Component::Normal(_))).collect();
            let mount = root.join(mount.strip_prefix("/").unwrap_or(&mount));
            folders.extend(below.ancestors().map(|part| (version, mount.join(part))));
        }
    }
    if folders.is_empty() {
        // where /proc tells nothing: the usual places
        folders.push((&VERSIONS[0], root.join("sys/fs/cgroup")));
        folders.push((&VERSIONS[1], root.join("sys/fs/cgroup/memory")));
    }
    folders.iter().filter_map(|(version, folder)| left_in(folder, version)).min_by(f64::total_cmp)
}

/// The process' group: the line `0::/path` of version 2, `4:memory:/path` of version 1.
fn own_group(groups: &str, version: &Version) -> Option<PathBuf> {
    groups.lines().find_map(|line| {
        let (number, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let meant = match version.kind {
            "cgroup2" => number == "0" && controllers.is_empty(),
            _ => controllers.split(',').any(|name| name == "memory"),
        };
        meant.then(|| PathBuf::from(path))
    })
}

/// Where groups of this version are mounted, and which group is seen there, of a line of mountinfo:
/// `30 23 0:26 /group /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw`.
fn mount(line: &str, version: &Version) -> Option<(PathBuf, PathBuf)> {
    let (place, kind) = line.split_once(" - ")?;
    let mut kind = kind.split(' ');
    let right = kind.next()? == version.kind
        && (version.kind == "cgroup2" || kind.next_back()?.split(',').any(|option| option == "memory"));
    let mut place = place.split(' ').skip(3).map(|path| PathBuf::from(path.replace("\\040", " ")));
    let (shown, at) = (place.next()?, place.next()?);
    right.then_some((at, shown))
}

/// What one group leaves; `None` without a limit of its own.
fn left_in(folder: &Path, version: &Version) -> Option<f64> {
    // "max" is no number
    let number = |name: &str| read_to_string(folder.join(name)).ok()?.trim().parse::<f64>().ok();
    let stat = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let line = |key: &str| {
        let value = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        value.and_then(|value| value.trim().parse::<f64>().ok())
    };
    let limits = version.limits.iter().filter_map(|name| number(name)).chain(line(version.above));
    let limit = limits.min_by(f64::total_cmp)?;
    let cache: f64 = version.cache.iter().filter_map(|key| line(key)).sum();
    let used = (number(version.used).unwrap_or(0.0) - cache).max(0.0);
    Some((limit - used).max(0.0))
}

/// What `ulimit -v` and `ulimit -d` leave.
#[cfg(target_os = "linux")]
fn of_the_process() -> Option<f64> {
    let status = read_to_string("/proc/self/status").ok()?;
    let left = |resource, used| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `getrlimit` writes to the struct that it is given, and nowhere else.
        let known = unsafe { libc::getrlimit(resource, &mut limit) } == 0 && limit.rlim_cur != libc::RLIM_INFINITY;
        known.then(|| (limit.rlim_cur as f64 - kib(&status, used).unwrap_or(0.0)).max(0.0))
    };
    let limits = [left(libc::RLIMIT_AS, "VmSize"), left(libc::RLIMIT_DATA, "VmData")];
    limits.into_iter().flatten().min_by(f64::total_cmp)
}

#[cfg(not(target_os = "linux"))]
fn of_the_process() -> Option<f64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const MIB: f64 = 1048576.0;

    /// What is left under these files.
    fn left(files: &[(&str, &str)]) -> Option<f64> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        in_groups(root.path()).map(|bytes| bytes / MIB)
    }

    const SECOND: &str = "35 24 0:31 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup rw,nsdelegate";

    #[test]
    fn the_group_with_the_least_left_counts_whichever_level_it_is_on() {
        let (mib_300, mib_64, mib_40) = ("314572800", "67108864", "41943040");
        let tree = [
            ("proc/self/mountinfo", SECOND),
            ("proc/self/cgroup", "0::/batch/job/task"),
            ("sys/fs/cgroup/batch/memory.max", mib_300),
            ("sys/fs/cgroup/batch/memory.current", mib_40),
            ("sys/fs/cgroup/batch/job/memory.max", mib_64),
            ("sys/fs/cgroup/batch/job/memory.current", mib_40),
            ("sys/fs/cgroup/batch/job/task/memory.max", "max"),
            ("sys/fs/cgroup/batch/other/memory.max", "1"),
        ];
        assert_eq!(left(&tree), Some(24.0));
        // used beyond the limit leaves nothing
        assert_eq!(left(&[&tree[..], &[("sys/fs/cgroup/batch/job/memory.high", "4096")]].concat()), Some(0.0));
        assert_eq!(left(&tree[..2]), None);
    }

    #[test]
    fn cache_that_is_given_back_does_not_count_as_used() {
        let mut tree = vec![
            ("proc/self/mountinfo", SECOND),
            ("proc/self/cgroup", "0::/"),
            ("sys/fs/cgroup/memory.max", "104857600"),
            ("sys/fs/cgroup/memory.current", "104857600"),
            ("sys/fs/cgroup/memory.stat", "anon 1\ninactive_file 62914560\nactive_file 10485760\nshmem 5"),
        ];
        assert_eq!(left(&tree), Some(70.0));
        tree[4].1 = "anon 104857600";
        assert_eq!(left(&tree), Some(0.0));
    }

    #[test]
    fn the_first_version_counts_too_in_a_container_and_beside_the_second() {
        let first = "36 24 0:33 /docker/f00 /sys/fs/cgroup/memory ro,nosuid master:17 - cgroup cgroup rw,memory";
        let other = "37 24 0:34 /docker/f00 /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct";
        let mounts = format!("{other}\n{first}\n{}", SECOND.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"));
        let tree = [
            ("proc/self/mountinfo", mounts.as_str()),
            ("proc/self/cgroup", "5:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00/part\n0::/docker/f00"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/part/memory.limit_in_bytes", "83886080"),
            ("sys/fs/cgroup/memory/part/memory.usage_in_bytes", "73400320"),
            ("sys/fs/cgroup/memory/part/memory.stat", "inactive_file 9\ntotal_inactive_file 20971520"),
        ];
        assert_eq!(left(&tree), Some(30.0));
        // a limit above what the container is shown
        let stat = "hierarchical_memory_limit 78643200\ntotal_inactive_file 20971520";
        assert_eq!(left(&[&tree[..5], &[(tree[5].0, stat)]].concat()), Some(25.0));
    }

    #[test]
    fn without_a_word_of_proc_the_usual_places_are_looked_at() {
        assert_eq!(left(&[("sys/fs/cgroup/memory.max", "1048576")]), Some(1.0));
        assert_eq!(left(&[]), None);
    }
}
