//! A few lines at the end of a terminal, drawn over again: what stands above them stays.

use std::io::{self, Stdout, Write as _, stdout};
use std::os::fd::AsRawFd as _;

/// Size of a terminal that does not tell.
const USUAL: (usize, usize) = (24, 80);

/// The lines. Dropped, the cursor is back and stands below them.
pub(super) struct Screen {
    out: Stdout,
    /// Lines drawn, and the size they were drawn for.
    drawn: usize,
    size: (usize, usize),
}

impl Screen {
    pub fn open() -> io::Result<Self> {
        let mut screen = Screen { out: stdout(), drawn: 0, size: (0, 0) };
        screen.size = screen.measure();
        screen.out.write_all(b"\n\x1b[?25l")?;
        Ok(screen)
    }

    /// Draws `text` in place of what was drawn before, cut to the terminal.
    pub fn draw(&mut self, text: &str) -> io::Result<()> {
        let size = self.measure();
        let mut frame = String::new();
        if size != self.size {
            // The terminal has broken the old lines anew, nobody knows where.
            frame.push_str("\x1b[2J\x1b[H");
        } else if self.drawn > 0 {
            frame.push_str(&format!("\x1b[{}A\r\x1b[J", self.drawn));
        }
        let lines: Vec<&str> = fit(text, size).collect();
        for (row, line) in lines.iter().enumerate() {
            let cut: String = line.chars().take(size.1).collect();
            // Headings stand out.
            let heading = row == 0 || lines[row - 1].is_empty();
            frame.push_str(&if heading { format!("\x1b[1m{cut}\x1b[0m\n") } else { format!("{cut}\n") });
        }
        self.drawn = lines.len();
        self.size = size;
        self.out.write_all(frame.as_bytes())?;
        self.out.flush()
    }

    /// Rows and columns.
    fn measure(&self) -> (usize, usize) {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the kernel writes one winsize, which is ours.
        let result = unsafe { libc::ioctl(self.out.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
        if result < 0 || size.ws_row == 0 || size.ws_col == 0 {
            return USUAL;
        }
        (size.ws_row.into(), size.ws_col.into())
    }
}

/// The lines that fit: the cursor needs one too.
fn fit(text: &str, (rows, _): (usize, usize)) -> impl Iterator<Item = &str> {
    text.lines().take(rows.saturating_sub(1))
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.out.write_all(b"\x1b[?25h");
        let _ = self.out.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_row_is_left_to_the_cursor() {
        assert_eq!(fit("a\nb\nc\n", (3, 80)).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(fit("a\n", (24, 80)).collect::<Vec<_>>(), ["a"]);
    }
}
