//! What the virtual machine sends: the output of suites, and between them lines of ours, each of which begins with byte 1
//! (`guest.sh`). The output itself is anything.

/// A part of the transcript.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    /// Output of the suite under way, as it comes: not by lines.
    Output(Vec<u8>),
    /// The kernel's release.
    Kernel(String),
    Begin(usize),
    /// The suite's number and its exit status as a shell has it: 128 and more for a signal.
    End(usize, i32),
    /// All suites have run.
    Done,
}

const MARK: u8 = 1;

/// More is no line of ours.
const LONGEST: usize = 200;

/// Cuts the transcript in parts.
#[derive(Debug, Default)]
pub struct Transcript {
    /// The line of ours that has begun.
    line: Option<Vec<u8>>,
}

impl Transcript {
    /// The parts that this piece completes.
    pub fn read(&mut self, piece: &[u8]) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut output = Vec::new();
        for &byte in piece {
            match &mut self.line {
                None if byte == MARK => self.line = Some(Vec::new()),
                None => output.push(byte),
                Some(line) if byte != b'\n' && line.len() < LONGEST => line.push(byte),
                Some(line) => {
                    let ours = parse(&String::from_utf8_lossy(line));
                    match ours {
                        Some(part) => {
                            if !output.is_empty() {
                                parts.push(Part::Output(std::mem::take(&mut output)));
                            }
                            parts.push(part);
                        }
                        // Some test printed the byte.
                        None => {
                            output.append(line);
                            output.push(byte);
                        }
                    }
                    self.line = None;
                }
            }
        }
        if !output.is_empty() {
            parts.push(Part::Output(output));
        }
        parts
    }
}

fn parse(line: &str) -> Option<Part> {
    let mut words = line.trim_end().split(' ');
    let part = match words.next()? {
        "kernel" => Part::Kernel(words.next()?.to_owned()),
        "begin" => Part::Begin(words.next()?.parse().ok()?),
        "end" => Part::End(words.next()?.parse().ok()?, words.next()?.parse().ok()?),
        "done" => Part::Done,
        _ => return None,
    };
    words.next().is_none().then_some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ours_are_found_wherever_the_pieces_are_cut_and_after_a_line_that_did_not_end() {
        let whole =
            b"\x01kernel 6.1.0-56-amd64\n\x01begin 3\ntest a ... ok\ntest b ... \x01end 3 139\n\x01done\n";
        for cut in 0..whole.len() {
            let mut transcript = Transcript::default();
            let mut parts = transcript.read(&whole[..cut]);
            parts.extend(transcript.read(&whole[cut..]));
            let output: Vec<u8> = parts
                .iter()
                .filter_map(|part| if let Part::Output(bytes) = part { Some(bytes.clone()) } else { None })
                .flatten()
                .collect();
            assert_eq!(output, b"test a ... ok\ntest b ... ");
            parts.retain(|part| !matches!(part, Part::Output(_)));
            let ours = [Part::Kernel("6.1.0-56-amd64".into()), Part::Begin(3), Part::End(3, 139), Part::Done];
            assert_eq!(parts, ours);
        }
    }

    #[test]
    fn what_only_looks_like_one_of_our_lines_is_output() {
        let mut transcript = Transcript::default();
        let parts = transcript.read(b"\x01end soon\n\x01begin 1 2\n");
        assert_eq!(parts, [Part::Output(b"end soon\nbegin 1 2\n".to_vec())]);
        let endless = [&[MARK][..], &[b'x'; 1000]].concat();
        assert_eq!(transcript.read(&endless), [Part::Output(vec![b'x'; 1000])]);
    }
}
