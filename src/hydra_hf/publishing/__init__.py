"""What a repo on the Hub needs: one flat folder, code for those who have not installed this package, a card, the upload."""
