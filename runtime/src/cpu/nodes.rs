//! Memory nodes: which cores are near which memory.
//!
//! On a machine with several nodes a core reads the memory of its own node faster, and all nodes together
//! have the bandwidth that a decode step wants. In such a step a thread reads the same panels of a matrix
//! every time ([`partition`](super::partition)). So threads are dealt to nodes in their order, and kept there;
//! what a thread reads then belongs into the memory of its node. That is where a page comes from when the
//! thread is the first to write to it.

use std::path::Path;

/// Where Linux tells of them.
const DIRECTORY: &str = "/sys/devices/system/node";

/// The CPUs of each node, in the order of the nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes(Vec<Vec<usize>>);

impl Nodes {
    /// Those of this machine; none where the system does not tell.
    pub fn of_machine() -> Nodes {
        Nodes::read(Path::new(DIRECTORY))
    }

    /// Those that a directory like [`DIRECTORY`] tells of: `node0/cpulist` and so on.
    pub fn read(directory: &Path) -> Nodes {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let node = |entry: std::fs::DirEntry| {
            let name = entry.file_name();
            let number: usize = name.to_str()?.strip_prefix("node")?.parse().ok()?;
            let list = std::fs::read_to_string(entry.path().join("cpulist")).ok()?;
            Some((number, cpus(&list)?))
        };
        let mut nodes: Vec<(usize, Vec<usize>)> = entries.filter_map(node).collect();
        nodes.sort_unstable();
        Nodes(nodes.into_iter().map(|(_, cpus)| cpus).collect())
    }

    /// For each of `threads` threads the CPUs among `cores` that it may run on: those of its node, or, where
    /// it is to be `pinned`, one of them that no other has. Neighbours are on one node or on neighbouring
    /// ones, and a node has threads in proportion to its cores. None where the cores are of one node, or
    /// fewer than the threads.
    pub fn place(&self, cores: &[usize], threads: usize, pinned: bool) -> Option<Vec<Vec<usize>>> {
        let of_node = |cpus: &Vec<usize>| -> Vec<usize> {
            let here = |core: &&usize| cpus.contains(core);
            cores.iter().filter(here).copied().collect()
        };
        let mut nodes: Vec<Vec<usize>> = self.0.iter().map(of_node).collect();
        nodes.retain(|cores| !cores.is_empty());
        let seats: Vec<(usize, &Vec<usize>)> = nodes
            .iter()
            .flat_map(|node| node.iter().map(move |&core| (core, node)))
            .collect();
        if nodes.len() < 2 || seats.len() < threads {
            return None;
        }
        let place = |thread: usize| match seats[thread * seats.len() / threads] {
            (core, _) if pinned => vec![core],
            (_, node) => node.clone(),
        };
        Some((0..threads).map(place).collect())
    }
}

/// The CPUs of a list like `0-3,8`; none where it is no such list.
fn cpus(list: &str) -> Option<Vec<usize>> {
    /// More than any machine has.
    const MOST: usize = 1 << 16;
    let mut cpus = Vec::new();
    // A node without CPUs, which is memory alone, has an empty list.
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A directory as Linux shows it.
    fn nodes(lists: &[(&str, &str)]) -> Nodes {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("possible"), "0-1\n").unwrap();
        fs::create_dir(dir.path().join("power")).unwrap();
        for (name, list) in lists {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("cpulist"), list).unwrap();
        }
        Nodes::read(dir.path())
    }

    #[test]
    fn nodes_are_read_in_their_order() {
        let found = nodes(&[
            ("node10", "12\n"),
            ("node2", "4-6,9\n"),
            ("node0", "0-3,8-8,10-11\n"),
            ("node3", "\n"),
            ("node4", "5-\n"),
            ("node5", "0-4294967296\n"),
            ("nodes", "7\n"),
        ]);
        let expected = [
            vec![0, 1, 2, 3, 8, 10, 11],
            vec![4, 5, 6, 9],
            vec![],
            vec![12],
        ];
        assert_eq!(found, Nodes(expected.to_vec()));
        assert_eq!(
            Nodes::read(Path::new("/no/such/directory")),
            Nodes::default()
        );
    }

    #[test]
    fn threads_are_dealt_to_nodes_in_order() {
        // Even and odd CPUs, as some machines number them, and one of memory alone.
        let two = nodes(&[("node0", "0,2,4,6"), ("node1", "1,3,5,7"), ("node2", "")]);
        let (even, odd) = (vec![0, 2, 4, 6], vec![1, 3, 5, 7]);
        let all: Vec<usize> = (0..8).collect();
        let placed = |cores: &[usize], threads| two.place(cores, threads, false).unwrap();
        let expected = [vec![even.clone(); 4], vec![odd.clone(); 4]].concat();
        assert_eq!(placed(&all, 8), expected);
        assert_eq!(placed(&all, 2), [even.clone(), odd.clone()]);
        assert_eq!(placed(&all, 3), [even.clone(), even.clone(), odd.clone()]);
        // What the process may not use is no node's.
        let expected = [vec![0, 4], vec![0, 4], vec![3]];
        assert_eq!(placed(&[0, 3, 4], 3), expected);

        let pinned = two.place(&all, 8, true).unwrap().concat();
        assert_eq!(pinned, [even, odd].concat());
        let pinned = two.place(&all, 4, true).unwrap().concat();
        assert_eq!(pinned, [0, 4, 1, 5]);
    }

    #[test]
    fn one_node_places_nothing() {
        let all = [0, 1, 2, 3];
        let one = nodes(&[("node0", "0-3"), ("node1", "")]);
        assert_eq!(one.place(&all, 2, false), None);
        assert_eq!(Nodes::default().place(&all, 2, false), None);
        let two = nodes(&[("node0", "0-1"), ("node1", "2-3")]);
        assert_eq!(two.place(&all[..2], 2, false), None);
        // Nor more threads than cores.
        assert_eq!(two.place(&all, 5, false), None);
        assert!(two.place(&all, 4, true).is_some());
    }
}
